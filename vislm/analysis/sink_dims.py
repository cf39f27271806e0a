"""Which dimensions of the residual stream make a token a sink."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.model import LMM, ImageSource

FIRST_LAYER = 2
"""Sinks form behind the first two layers."""


def find_sink_dims(lmm: LMM, image: ImageSource | None, question: str, tau: float = 20.0) -> tuple[int, ...]:
    """Return the dimensions in which the first token's |x_j| / RMS(x) exceeds ``tau``, mean over the layers from 2 on.

    One prompt suffices to see them; none are found in small models, because the ratio never exceeds the square root of
    the width.
    """
    width = lmm.adapter.text_config.hidden_size
    if tau >= width**0.5:
        return ()
    inputs = lmm.prepare([image], [question])
    seen: list[Tensor] = []
    hooks = Hooks()

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = named_arguments(module, args, kwargs)["hidden_states"][0, 0].detach().float()
        seen.append(x.abs() * (x.square().mean() + 1e-6).rsqrt())

    model: Any = lmm.model
    try:
        for layer in lmm.adapter.layers[FIRST_LAYER:]:
            hooks.before(layer, look)
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        hooks.remove()
    if not seen:
        return ()
    return tuple((torch.stack(seen).mean(0) > tau).nonzero().flatten().tolist())
