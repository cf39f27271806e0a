"""RESTORE: correcting the attention logits for what token reduction does to them.

A kept token that stands for s others should weigh like s tokens, and rotary embeddings lower the logits of distant
tokens, of which a shortened prompt has relatively more. With the original positions m of the query and n of the key,
``log(s_n (c - D(|m - n|)))`` is added, D the mean cosine of the rotary angles: nothing where s is 1 and n is m. Samples
that have lost no token are left alone.

Source: Cho et al., "RESTORE", ICML 2026. Written from the paper's formulas; there is no released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.interventions import BiasStage, BiasView


def rotary_similarity(cos: Tensor, sin: Tensor, queries: int) -> Tensor:
    """Return D (B, Nq, Nk): the mean over rotary frequencies of cos(angle of the query - angle of the key).

    Args:
        cos: (B, Nk, d) of every key; the last ``queries`` rows are the queries'.
        sin: (B, Nk, d).
        queries: Nq.
    """
    angle = torch.nn.functional.normalize(torch.cat([cos, sin], -1).float(), dim=-1)
    return angle[:, -queries:] @ angle.transpose(1, 2)


def calibration(view: BiasView, c: float = 2.0) -> Tensor:
    """Return log(s_n (c - D)) of shape (B, 1, Nq, Nk) in float32."""
    similarity = rotary_similarity(view.cos, view.sin, view.queries)
    bias = (c - similarity).log() + view.size[:, None].log()
    return torch.where(view.reduced[:, None, None], bias, 0.0).unsqueeze(1)


def calibration_stage() -> BiasStage:
    """Return the stage that calibrates every decoder layer."""
    return BiasStage(calibration, per_layer=False)
