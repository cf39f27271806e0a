"""Comparing an LMM's patches with the question in CLIP's joint space, where the LMM's tower is CLIP's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vislm.errors import CheckpointError

SEGMENT = 77
"""Tokens of CLIP's text encoder, start and end token included."""


@dataclass(frozen=True)
class ClipSpace:
    """A CLIP model whose vision tower is the one in the LMM."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """Return patch embeddings (..., E) of the tower's features (..., Cv), by CLIP's last norm and projection.

        Raises:
            CheckpointError: the tower has another width than this CLIP model.
        """
        width = self.model.config.vision_config.hidden_size
        if features.shape[-1] != width:
            raise CheckpointError(
                f"the vision tower's features have {features.shape[-1]} channels and the CLIP model's {width}; give "
                "the CLIP model that the tower was taken from"
            )
        norm = self.model.vision_model.post_layernorm
        return self.model.visual_projection(norm(features.to(norm.weight)))

    @torch.no_grad()
    def text(self, question: str) -> Tensor:
        """Return embeddings (M, E) of a question, cut into M segments that fit the text encoder."""
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        inner = SEGMENT - 2
        segments = [ids[start : start + inner] for start in range(0, max(len(ids), 1), inner)]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [self._embed(torch.tensor([[first, *segment, last]])) for segment in segments]
        return torch.cat(rows)

    def _embed(self, ids: Tensor) -> Tensor:
        out = self.model.get_text_features(input_ids=ids.to(self.model.device))
        return out if isinstance(out, Tensor) else out.pooler_output


@functools.lru_cache(maxsize=2)
def load_clip(name: str) -> ClipSpace:
    """Load a CLIP model and its tokenizer from a local folder, or from the hub by name; safetensors only.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, CLIPModel

    local = Path(name).is_dir()
    try:
        model = CLIPModel.from_pretrained(name, use_safetensors=True, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the CLIP model {name!r}: {error}") from error
    return ClipSpace(model.eval(), tokenizer)
