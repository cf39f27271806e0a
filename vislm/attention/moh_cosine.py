"""Mixture-of-head attention with cosine logits among all tokens: MoH-ViT's last stage.

Source: TransNeXt (arXiv 2311.17132), MoH (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vislm.attention.moh import gated
from vislm.attention.moh_position import CosineHeads
from vislm.attention.tokens import check_tokens, merge_heads, split_heads
from vislm.kernels import RelativeBias, Window, attend


class MohCosineAttention(CosineHeads):
    """``proj([gate_i softmax(cosine logits + position bias) v_i])`` among all tokens; see :class:`CosineHeads`.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        shared_heads: the heads in front that every token uses; None = half of them.
        routed_heads: how many of the others each token uses; None = half of those, rounded up.
        pretrained_grid: sides of the grid in pre-training, one number or one per axis: the unit of the position bias.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front; they attend like the others, without a position bias.

    The state dict has the official names, with the routers apart: ``qkv, query_embedding, temperature, cpb_fc1,
    cpb_fc2, proj, router.wg, router.wg_0, router.wg_1``. All heads are computed: in this stage of MoH-ViT, the products
    of the attention are a few percent of the work.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        *,
        pretrained_grid: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, pretrained_grid, proj_drop)
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, axes=2)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        # By key minus query, as RelativeBias counts, from the topmost key to the lowest.
        table = self.bias_table(*(torch.arange(side - 1, -side, -1) for side in grid))
        heads = attend(
            self.scaled(normalize(query, dim=-1), x.shape[1]),
            normalize(key, dim=-1),
            value,
            pattern=Window(grid, grid, prefix=self.num_prefix_tokens),
            bias=RelativeBias(table),
            scale=1.0,
        )
        return self.proj_drop(self.proj(merge_heads(gated(heads, self.router(x)))))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: projections, routers, position bias, the products of attention."""
        tokens = math.prod(grid) + self.num_prefix_tokens
        bias = self.bias_macs(*(2 * side - 1 for side in grid))
        return 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim + bias + self.router.macs(tokens)
