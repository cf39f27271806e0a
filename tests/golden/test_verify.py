"""Every committed fixture passes, and a wrong number does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from vislm.errors import UsageError
from vislm.golden import verify_folder

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("method", sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and p.name != "__pycache__"))
def test_fixtures_pass(method) -> None:
    verdicts = list(verify_folder(FOLDER / method))
    assert [v for v in verdicts if v.status != "pass"] == []
    assert any(v.status == "pass" for v in verdicts)


CASES = [
    "flowcut/clip_tower_b2",
    "flowcut/llm_stage",
    "flowcut/qwen2vl_vit",
    "fastv/fastv_drop_k2",
    "vhr/decoder_case1",
]


@pytest.mark.parametrize("case", CASES)
def test_any_changed_output_is_noticed(case, tmp_path) -> None:
    source = FOLDER / f"{case}.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    ignored = ("hidden_after", "plain_prefill", "sq_norm")
    for name in [k for k in tensors if k.startswith("out.") and not any(i in k for i in ignored)]:
        wrong = dict(tensors)
        value = tensors[name].clone()
        value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype.is_floating_point is False else value.view(-1)[-1] + 0.1
        wrong[name] = value
        save_file(wrong, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name


def test_unknown_fixtures_are_unknown(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"meta": {"method": "telepathy"}}))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    (tmp_path / "d.json").write_text(json.dumps([1]))
    shutil.copy(FOLDER / "vhr" / "heads_case1.safetensors", tmp_path / "e.safetensors")
    assert [v.status for v in verify_folder(tmp_path)] == ["unknown"] * 4 + ["pass"]


def test_a_folder_without_fixtures_is_an_error(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no"):
        list(verify_folder(tmp_path))
    with pytest.raises(UsageError, match="not a folder"):
        list(verify_folder(tmp_path / "missing"))
