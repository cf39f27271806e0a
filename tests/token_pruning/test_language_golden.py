"""The golden checks of SparseVLM, PyramidDrop and FastV notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(p for method in ("sparsevlm", "pyramiddrop", "fastv") for p in (FOLDER / method).iterdir())


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_any_changed_output_is_noticed(path, tmp_path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in [key for key in tensors if key.startswith("out.")]:
        changed = tensors[name].clone()
        changed.view(-1)[-1] = changed.view(-1)[-1] + 0.1 if changed.is_floating_point() else ~changed.view(-1)[-1]
        save_file({**tensors, name: changed}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name
        assert any(not c.passed and c.name.startswith(name.removeprefix("out.")) for c in verdict.comparisons), name


@pytest.mark.parametrize("method", ["sparsevlm", "pyramiddrop"])
def test_other_kinds_are_unknown(method, tmp_path) -> None:
    save_file({"in.x": torch.zeros(1)}, tmp_path / "a.safetensors", {"method": method})
    assert [verdict.status for verdict in verify_folder(tmp_path)] == ["unknown"]
