"""Sigmoid attention: each weight is a sigmoid of its own logit, without a sum over the keys.

Source: Ramapuram, Danieli, Dhekane, Weers, Busbridge, Ablin, Likhomanenko et al., *Theory, Analysis, and Best Practices
for Sigmoid Self-Attention* (ICLR 2025, arXiv 2409.04431); official repository apple/ml-sigmoid-attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vislm.attention.sigmoid_heads import BiasRule, RowNorm, SigmoidHeads, initialize
from vislm.errors import UsageError
from vislm.kernels import Attended, Dense, Pattern, StatisticsRequest
from vislm.kernels.factors import alibi_slopes

_DENSE = Dense()


class SigmoidAttention(SigmoidHeads):
    """Self-attention with sigmoid weights, ``sigmoid((q k^T / sqrt(D) + alibi) exp(attn_temp) + attn_bias) v``.

    Weights are exactly 0 where the pattern hides a key, do not sum to one, and do not depend on the other keys.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_norm: LayerNorm over each head of queries and keys, before the rotation.
        bias: ``"-log_n"`` = ``-log(n_train)`` for good; ``"-log_n_current"`` = minus the logarithm of the call's number
            of keys, so that rows keep their mass after pruning or at another resolution; or a number.
        n_train: number of keys in training, class and register tokens included; for ``bias="-log_n"``.
        temperature: logarithm of the logits' factor.
        trainable: make ``attn_bias`` and ``attn_temp`` parameters; they are buffers as published.
        rope: rotate queries and keys by their position in the sequence (interleaved pairs, base 10000).
        alibi: add ``slope (j - i)`` to the logits before the temperature; in half precision with slopes rounded to
            bfloat16 and exact positions.
        row_norm: divide row i by ``i + 1`` (``"length"``) or its root (``"sqrt_length"``).
        proj_bias: bias of the output projection.
        proj_drop: dropout behind it. There is no dropout of weights.
        num_prefix_tokens: class and register tokens in front; they are tokens like the others.

    The state dict has the official names: ``qkv, proj, q_norm, k_norm, attn_bias, attn_temp``. A softmax checkpoint can
    be loaded but must be fine-tuned.

    Raises:
        UsageError: sizes that do not fit, or ``bias="-log_n"`` without ``n_train``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        bias: BiasRule | float = "-log_n",
        *,
        n_train: int | None = None,
        temperature: float = 0.0,
        trainable: bool = False,
        rope: bool = False,
        alibi: bool = False,
        row_norm: RowNorm | None = None,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qk_norm=qk_norm,
            bias=bias,
            n_train=n_train,
            temperature=temperature,
            trainable=trainable,
            row_norm=row_norm,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
        )
        if rope and self.head_dim % 2:
            raise UsageError(f"rope=True rotates pairs of channels, but head_dim = {dim} / {num_heads} is odd")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rope, self.alibi, self.num_prefix_tokens = rope, alibi, num_prefix_tokens
        initialize(self)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, ...] | None = None,
        *,
        pattern: Pattern = _DENSE,
        statistics: StatisticsRequest | None = None,
    ) -> Tensor | Attended:
        """Return the output ``(B, N, C)``, with ``statistics`` an :class:`~vislm.kernels.Attended`.

        Args:
            x: ``(B, N, C)``.
            grid: not used; any sequence will do.
            pattern: which token sees which.
            statistics: what to measure of the weights.
        """
        query, key, value = (self.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rope:
            query, key = _rotated(query), _rotated(key)
        slopes = alibi_slopes(self.num_heads, device=x.device) if self.alibi else None
        return self.attended(query, key, value, pattern, statistics, slopes)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections and the two products of the attention."""
        tokens, dim = self.num_prefix_tokens + math.prod(grid), self.num_heads * self.head_dim
        return 4 * tokens * dim**2 + 2 * tokens**2 * dim


class SigmoidCrossAttention(SigmoidHeads):
    """Cross-attention with sigmoid weights; values always get a LayerNorm per head, as in the official class.

    Args:
        dim: width C of the queries and the output.
        num_heads: H.
        kv_dim: width of the context, None = ``dim``.
        qkv_bias: bias of ``q_proj`` and of the joint ``kv_proj``, rows ``[k | v]``.
        qk_norm, bias, n_train, temperature, trainable, row_norm, proj_bias, proj_drop: as in
            :class:`SigmoidAttention`; the keys are the context's tokens.

    The state dict has the official names: ``q_proj, kv_proj, proj, q_norm, k_norm, v_norm, attn_bias, attn_temp``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        bias: BiasRule | float = "-log_n",
        *,
        kv_dim: int | None = None,
        n_train: int | None = None,
        temperature: float = 0.0,
        trainable: bool = False,
        row_norm: RowNorm | None = None,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qk_norm=qk_norm,
            bias=bias,
            n_train=n_train,
            temperature=temperature,
            trainable=trainable,
            row_norm=row_norm,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
        )
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_proj = nn.Linear(dim if kv_dim is None else kv_dim, 2 * dim, bias=qkv_bias)
        self.v_norm = nn.LayerNorm(self.head_dim)
        initialize(self)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        pattern: Pattern = _DENSE,
        statistics: StatisticsRequest | None = None,
    ) -> Tensor | Attended:
        """Return what ``x (B, Nq, C)`` reads from ``context (B, Nk, kv_dim)``, ``(B, Nq, C)``."""
        key, value = (self.heads(part) for part in self.kv_proj(context).chunk(2, dim=-1))
        query = self.q_norm(self.heads(self.q_proj(x)))
        return self.attended(query, self.k_norm(key), self.v_norm(value), pattern, statistics)


def _rotated(tokens: Tensor) -> Tensor:
    """Return (B, H, N, D) with each pair of channels (2i, 2i + 1) turned by ``position * 10000^(-2i / D)``."""
    tokens_count, dim = tokens.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=tokens.device, dtype=torch.float32) / dim)
    angle = torch.arange(tokens_count, device=tokens.device, dtype=torch.float32)[:, None] * frequency
    even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(tokens.dtype)
