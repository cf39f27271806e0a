"""The finished model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from vislm.training.tiny.vocabulary import build_processor


def export(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Write weights (bfloat16, safetensors), configuration, tokenizer and processor; return the folder."""
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    build_processor().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return folder
