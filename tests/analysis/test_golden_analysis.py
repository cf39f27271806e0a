"""The golden checks of the analysis pass, and notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden" / "attention_analysis"
FIXTURES = sorted(FOLDER.glob("*.safetensors"))


def test_fixtures_pass() -> None:
    verdicts = list(verify_folder(FOLDER))
    assert len(verdicts) == len(FIXTURES) == 4
    assert {verdict.status for verdict in verdicts} == {"pass"}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_any_changed_output_is_noticed(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith("out.")]
    wrong = dict(tensors)
    for name in names:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1 if not changed.is_floating_point() else 0.1
        wrong[name] = changed
    save_file(wrong, tmp_path / "case.safetensors", metadata)
    (verdict,) = verify_folder(tmp_path)
    failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
    assert failed >= {name.removeprefix("out.") for name in names}


def test_unknown_fixtures_are_not_passed(tmp_path: Path) -> None:
    save_file({"out.x": torch.zeros(1)}, tmp_path / "x.safetensors", {"method": "attention_analysis", "kwargs": "{}"})
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status not in ("pass", "fail")
