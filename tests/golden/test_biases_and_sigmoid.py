"""The checks of FlashBias and of sigmoid attention notice every changed number, and know what they do not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parent
CASES = sorted(f"{p.parent.name}/{p.stem}" for m in ("flashbias", "sigmoid") for p in (FOLDER / m).iterdir())


def _tensors(case: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(FOLDER / f"{case}.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def _changed(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name in [k for k in tensors if k.startswith(("out.", "grad."))]:
        value = tensors[name].clone()
        value.view(-1)[-1] += 0.01 if value.is_floating_point() else 1
        yield name, {**tensors, name: value}


@pytest.mark.parametrize("case", CASES)
def test_any_changed_number_is_noticed(case, tmp_path) -> None:
    tensors, metadata = _tensors(case)
    for name, wrong in _changed(tensors):
        save_file(wrong, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name


@pytest.mark.parametrize("case", CASES)
def test_any_changed_parameter_is_noticed(case, tmp_path) -> None:
    tensors, metadata = _tensors(case)
    for name in [k for k in tensors if k.startswith("param.")]:
        value = tensors[name].clone()
        value.view(-1)[0] += 0.1  # one entry: a LayerNorm would hide a shift of them all
        save_file({**tensors, name: value}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name


@pytest.mark.parametrize("method", ["flashbias", "sigmoid"])
def test_other_fixtures_are_unknown(method, tmp_path) -> None:
    save_file({"in.mystery": torch.ones(1)}, tmp_path / "case.safetensors", {"method": method})
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "unknown"
    assert "no known" in verdict.reason
