"""Additive attention biases as two thin factors, ``bias = query_factor @ key_factor^T`` (FlashBias).

Each function returns a :class:`~vislm.kernels.bias.LowRankBias` for ``attend(bias=...)``, which appends the factors to
query and key as extra channels: no ``Nq x Nk`` bias is ever stored, and gradients reach the factors.

Source: Wu, Guo, Ma, Sun, Wang, Matusik, Long, *FlashBias: Fast Computation of Attention with Bias* (NeurIPS 2025,
arXiv 2505.12044); official repository thuml/FlashBias.
"""

from __future__ import annotations

from vislm.kernels.factors.alibi import alibi_bias, alibi_slopes
from vislm.kernels.factors.distance import squared_distance_bias
from vislm.kernels.factors.positions import (
    class_token_bias,
    cosine_bias,
    decomposed_position_bias,
    resize_position_table,
)
from vislm.kernels.factors.svd import BiasReport, FactorizedBias, factorize_bias, spectrum, truncated_bias

__all__ = [
    "BiasReport",
    "FactorizedBias",
    "alibi_bias",
    "alibi_slopes",
    "class_token_bias",
    "cosine_bias",
    "decomposed_position_bias",
    "factorize_bias",
    "resize_position_table",
    "spectrum",
    "squared_distance_bias",
    "truncated_bias",
]
