"""Checkpoints that cannot be used, and why."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import torch

from vislm import load_lmm
from vislm.errors import CheckpointError, UsageError
from vislm.lmm.loading import EMBEDDED

TINY = EMBEDDED["vislm-tiny"]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def test_a_local_folder_loads_and_is_the_embedded_model(folder) -> None:
    assert load_lmm(folder).fingerprint()["weights"] == load_lmm().fingerprint()["weights"]


def test_a_pickle_is_refused_before_it_is_opened(folder) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model.bin\), which can run code"):
        load_lmm(folder)


def test_a_pickle_called_safetensors_is_refused(folder) -> None:
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_lmm(folder)


def test_a_text_only_checkpoint_is_refused(tmp_path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(models.configs()[1]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="text-only checkpoint"):
        load_lmm(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "./missing/folder", "/missing", "a/b/c"])
def test_a_name_that_is_nothing_is_refused_without_network(name) -> None:
    with pytest.raises(CheckpointError, match="neither embedded"):
        load_lmm(name)


def test_an_empty_folder_and_broken_json_are_refused(tmp_path, folder) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_lmm(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_lmm(folder)


def test_a_family_without_adapter_is_refused(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "paligemma"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no adapter for the family 'paligemma'"):
        load_lmm(folder)


def test_missing_weights_are_refused(folder) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights, such as .*q_proj"):
        load_lmm(folder)


def test_dtypes() -> None:
    assert load_lmm().model.dtype == torch.float32
    assert load_lmm(dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype='float17'"):
        load_lmm(dtype="float17")
