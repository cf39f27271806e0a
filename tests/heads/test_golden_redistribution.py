"""The golden checks of VAR, PAINT, ACT and CARVE pass, and notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden"
METHODS = ("act", "carve", "imbalanced", "var")
FIXTURES = sorted(path for method in METHODS for path in (FOLDER / method).glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_fixtures_pass(method: str) -> None:
    verdicts = list(verify_folder(FOLDER / method))
    assert {verdict.status for verdict in verdicts} == {"pass"}
    assert not any("not compared" in verdict.reason for verdict in verdicts)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_any_changed_output_is_noticed(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in (name for name in tensors if name.startswith("out.")):
        changed = tensors[name].clone()
        if changed.numel():
            changed.view(-1)[-1] += 0.1 if changed.is_floating_point() else 1
        else:  # no head passed; say that one did
            changed = changed.new_zeros(1, *changed.shape[1:])
        save_file({**tensors, name: changed}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        failed = {comparison.name.split(" ")[0] for comparison in verdict.comparisons if not comparison.passed}
        assert failed == {name.removeprefix("out.")}
