"""The same prompt without its image, run beside the real prefill one decoder layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import compact, gather_rows


class TextStream:
    """Hidden states of the text-only prompts of a batch.

    Costs one extra prefill of the text tokens. A layer of this stream runs when the real prompt's attention of that
    layer has its heads' outputs ready: then both outputs are known, a decision can be made from their difference, and
    both streams can go on with its effect.
    """

    def __init__(self, adapter: Adapter, input_ids: Tensor, mask: Tensor | None) -> None:
        keep = ~adapter.is_visual(input_ids)
        if mask is not None:
            keep = keep & mask.bool()
        index, valid = compact(keep, pad="left")
        if valid is None:
            valid = torch.ones_like(index, dtype=torch.bool)
        self.layers = adapter.layers
        self.hidden = adapter.embed(gather_rows(input_ids, index))
        self.positions = (valid.cumsum(-1) - 1).clamp(min=0)
        self.rotary = adapter.rotary(self.hidden, self.positions)
        self.mask = None if bool(valid.all()) else _causal_mask(valid)

    def advance(self, number: int) -> None:
        """Run decoder layer ``number`` on the stream, without cache and without the hooks on the layer itself.

        Calling ``forward`` directly also keeps the stream out of transformers' recorded hidden states.
        """
        arguments: dict[str, Any] = {
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "position_embeddings": self.rotary,
            "past_key_values": None,
            "use_cache": False,
        }
        out = self.layers[number].forward(self.hidden, **arguments)
        self.hidden = out[0] if isinstance(out, tuple) else out


def _causal_mask(valid: Tensor) -> Tensor:
    """Return (B, 1, S, S) bool: causal, padding hidden; padding sees itself so that no row is empty."""
    width = valid.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
    own = torch.eye(width, dtype=torch.bool, device=valid.device)
    return ((causal & valid[:, None, :]) | own)[:, None]
