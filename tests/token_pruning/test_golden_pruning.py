"""The golden checks of pruning methods pass, and notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden"
METHODS = ("cdpruner", "divprune")
FIXTURES = sorted(path for method in METHODS for path in (FOLDER / method).glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_fixtures_pass(method: str) -> None:
    verdicts = verify_folder(FOLDER / method)
    assert {verdict.status for verdict in verdicts} == {"pass"}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_any_changed_output_is_noticed(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith("out.")]
    wrong = dict(tensors)
    for name in names:
        changed = tensors[name].clone()
        entry = changed.view(-1)[-1:]
        entry.copy_(~entry if changed.dtype == torch.bool else entry + (0.1 if changed.is_floating_point() else 1))
        wrong[name] = changed
    save_file(wrong, tmp_path / "case.safetensors", metadata)
    (verdict,) = verify_folder(tmp_path)
    failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
    assert failed >= {name.removeprefix("out.") for name in names}
