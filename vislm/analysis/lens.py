"""Generation-probability lens: what the last row of every decoder layer would say if it were the last layer.

Source of the use: Kim et al., "Map the Flow", ICLR 2026, arXiv 2510.13251. Its script reads inner layers by the input
embedding without a norm; the usual lens is the final norm and the output embedding. Both are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.hooks import Hooks
from vislm.lmm.model import LMM

Readout = Literal["norm_and_head", "input_embedding"]


@dataclass(frozen=True)
class Lens:
    """Next-token distributions behind every layer."""

    log_probability: Tensor
    """(L, V) float32."""

    def top(self, count: int = 5) -> tuple[Tensor, Tensor]:
        """Return probabilities and ids, (L, count) each, of the likeliest tokens."""
        best = self.log_probability.topk(min(count, self.log_probability.shape[1]), dim=-1)
        return best.values.exp(), best.indices

    def probability(self, token: int) -> Tensor:
        """Return (L,): the probability of one token behind each layer."""
        return self.log_probability[:, token].exp()


def read_layers(lmm: LMM, inputs: dict[str, Tensor], readout: Readout = "norm_and_head") -> Lens:
    """Return the lens of one prompt.

    Args:
        lmm: the model.
        inputs: of ``lmm.prepare``, one prompt.
        readout: final norm and output embedding for all layers; or, as in the script, the input embedding without a
            norm for all but the last.

    Raises:
        UsageError: an unknown readout, or several prompts.
    """
    if readout not in ("norm_and_head", "input_embedding"):
        raise UsageError(f"{readout=}: expected 'norm_and_head' or 'input_embedding'")
    if len(inputs["input_ids"]) != 1:
        raise UsageError(f"{len(inputs['input_ids'])} prompts; the lens reads one")
    states: list[Tensor] = []
    hooks = Hooks()

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    model: Any = lmm.model
    try:
        for layer in lmm.adapter.layers:
            hooks.after(layer, keep)
        with torch.no_grad():
            last = model(**inputs, use_cache=False).logits[0, -1]
    finally:
        hooks.remove()
    with torch.no_grad():
        stacked = torch.stack(states)
        if readout == "norm_and_head":
            logits = model.get_output_embeddings()(lmm.adapter.language_model.norm(stacked))
        else:
            logits = stacked @ model.get_input_embeddings().weight.T.to(stacked.dtype)
        logits = torch.cat([logits[:-1], last[None].to(logits.dtype)])
    return Lens(logits.float().log_softmax(-1).cpu())
