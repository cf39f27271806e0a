"""The golden checks of attention modules and backbones notice every changed number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.golden import verify_folder

FOLDER = Path(__file__).parents[1] / "golden"
METHODS = ("agent", "halo", "moh", "neighborhood", "sg_former", "super_token", "van")
FIXTURES = sorted(path for method in METHODS for path in (FOLDER / method).glob("*.safetensors"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_any_changed_output_or_gradient_is_noticed(path, tmp_path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith(("out.", "grad."))]
    wrong = dict(tensors)
    for name in names:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 0.1 if changed.is_floating_point() else 1
        wrong[name] = changed
    save_file(wrong, tmp_path / "case.safetensors", metadata)
    (verdict,) = verify_folder(tmp_path)
    failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
    assert failed >= {name.removeprefix("out.") for name in names if name != "out.counts"}
    assert verdict.status == "fail"


@pytest.mark.parametrize("name", ["natten.na4d", "natten.modules.Unknown", "timm.models.resnet.ResNet"])
def test_other_classes_are_unknown(name, tmp_path) -> None:
    for method in METHODS:
        metadata = {"method": method, "class_or_function": name, "kwargs": "{}"}
        save_file({"in.x": torch.zeros(1)}, tmp_path / f"{method}.safetensors", metadata)
    assert [verdict.status for verdict in verify_folder(tmp_path)] == ["unknown"] * len(METHODS)
