"""The golden checks of head methods pass, and notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden"
METHODS = ("air", "pai", "spin")
FIXTURES = sorted(path for method in METHODS for path in (FOLDER / method).glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_fixtures_pass(method: str) -> None:
    verdicts = verify_folder(FOLDER / method)
    assert {verdict.status for verdict in verdicts} == {"pass"}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_any_changed_output_is_noticed(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith("out.")]
    for name in names:
        changed = tensors[name].clone()
        finite = changed.view(-1).isfinite().nonzero()[-1]
        changed.view(-1)[finite] += 0.1
        save_file({**tensors, name: changed}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
        assert failed == {name.removeprefix("out.")}
    assert torch.cat([tensors[name].flatten() for name in names]).numel()
