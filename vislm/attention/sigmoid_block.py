"""The transformer block around sigmoid attention.

Source: arXiv 2409.04431; official repository apple/ml-sigmoid-attention.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, cast

from torch import Tensor, nn

from vislm.attention.layer_scale import LayerScale
from vislm.attention.sigmoid import SigmoidAttention
from vislm.attention.sigmoid_heads import initialize
from vislm.errors import UnknownName
from vislm.kernels import Dense, Pattern

_DENSE = Dense()
_POST_NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class SigmoidBlock(nn.Module):
    """A pre-norm transformer block with sigmoid attention: ``x + ls1(attn(norm1 x))``, then ``x + ls2(mlp(norm2 x))``.

    Sigmoid attention has large norms early in training; LayerScale or a norm of the attention branch keeps them small.

    Args:
        dim: width C.
        num_heads: H.
        mlp_hidden: hidden width of the MLP, None = ``4 dim``.
        layer_scale: initial ``gamma`` of both branches, None = without.
        post_attn_norm: ``"layer"`` or ``"rms"``: also normalise the projected attention branch ("hybrid norm"). No
            official code of this exists to compare with.
        mlp_bias: bias of ``mlp.fc2``; ``mlp.fc1`` never has one.
        attention: options of :class:`SigmoidAttention`.

    The state dict has the official names: ``norm1, attn, ls1, norm2, mlp.fc1, mlp.fc2, ls2``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mlp_hidden: int | None = None,
        layer_scale: float | None = 1e-4,
        post_attn_norm: Literal["layer", "rms"] | None = None,
        mlp_bias: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        if post_attn_norm is not None and post_attn_norm not in _POST_NORMS:
            raise UnknownName("post_attn_norm", str(post_attn_norm), _POST_NORMS)
        hidden = 4 * dim if mlp_hidden is None else mlp_hidden
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SigmoidAttention(dim, num_heads, **attention)
        self.post_attn_norm = nn.Identity() if post_attn_norm is None else _POST_NORMS[post_attn_norm](dim, eps=1e-5)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        layers = {"fc1": nn.Linear(dim, hidden, bias=False), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim, mlp_bias)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        initialize(self.mlp)

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, *, pattern: Pattern = _DENSE) -> Tensor:
        """Return the block's output ``(B, N, C)`` for x ``(B, N, C)``."""
        attended = cast(Tensor, self.attn(self.norm1(x), grid, pattern=pattern))
        x = x + self.ls1(self.post_attn_norm(attended))
        return x + self.ls2(self.mlp(self.norm2(x)))
