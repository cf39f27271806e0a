"""What MoH-ViT's two attentions share: length-scaled cosine logits, a position bias from a small network, gates.

Source: TransNeXt (arXiv 2311.17132), MoH (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from vislm.attention.head_routing import HeadRouter
from vislm.attention.moh import default_heads
from vislm.attention.remembered import Remembered
from vislm.attention.tokens import check_heads, per_axis

HIDDEN, REACH, TEMPERATURE = 512, 8, 0.24
CHUNK = 2**24
"""Largest number of hidden values of the bias network that are in memory at once, for gradients."""
CACHED = 2**19
"""The same in inference: as many as a cache holds."""


class CosineHeads(nn.Module):
    """Cosine logits ``(q / |q| + QE) softplus(tau) ln(number of keys) . k / |k|``, with a bias by relative position.

    The bias of positions D apart is a network ``cpb`` of ``sign(D') log2(|D'| + 1) / log2(8)`` along both axes, where
    ``D' = 8 D / (side - 1)`` for the ``side`` of the grid in pre-training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int | None,
        routed_heads: int | None,
        pretrained_grid: int | Sequence[int],
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, head_dim = dim, num_heads, check_heads(dim, num_heads)
        self.pretrained_grid = per_axis("pretrained_grid", pretrained_grid, 2)
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        # softplus of it is 1 / 0.24
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / TEMPERATURE))))
        self.cpb_fc1 = nn.Linear(2, HIDDEN)
        self.cpb_fc2 = nn.Linear(HIDDEN, num_heads)
        self.remembered = Remembered()
        self.router = HeadRouter(dim, num_heads, *default_heads(num_heads, shared_heads, routed_heads))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        network = {f"cpb_fc{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")}
        return {"query_embedding", "temperature", "relative_pos_bias_local", *network}

    def scaled(self, unit: Tensor, keys: int | Tensor) -> Tensor:
        """Return the queries for the dot product, from unit ones ``(B, H, N, D)``.

        Args:
            unit: the queries divided by their norms.
            keys: how many keys each query sees, a number or ``(N,)``.
        """
        count = torch.as_tensor(keys, device=unit.device, dtype=torch.float32).log().view(-1, 1)
        return (unit + self.query_embedding) * softplus(self.temperature) * count.to(unit.dtype)

    def bias_table(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the bias ``(H, R, S)`` of queries that are ``rows`` ``(R,)`` and ``columns`` ``(S,)`` from the key.

        Large tables are computed some rows at a time, and again in the backward pass. In inference the last one is
        kept, unless it is large.
        """
        network = (self.cpb_fc1.weight, self.cpb_fc1.bias, self.cpb_fc2.weight, self.cpb_fc2.bias)
        if torch.compiler.is_compiling():
            return self._bias_table(rows, columns)
        return self.remembered(
            (tuple(rows.tolist()), tuple(columns.tolist())), network, lambda: self._bias_table(rows, columns)
        )

    def _bias_table(self, rows: Tensor, columns: Tensor) -> Tensor:
        learns = torch.is_grad_enabled()
        parts = rows.split(max(1, (CHUNK if learns else CACHED) // (HIDDEN * len(columns))))
        if len(parts) == 1 or not learns:
            tables = [self._bias_rows(part, columns) for part in parts]
        else:
            tables = [cast(Tensor, checkpoint(self._bias_rows, part, columns, use_reentrant=False)) for part in parts]
        return torch.cat(tables, dim=1)

    def _bias_rows(self, rows: Tensor, columns: Tensor) -> Tensor:
        weight = self.cpb_fc1.weight
        steps = [
            REACH * offset.to(weight.device, torch.float32) / max(side - 1, 1)
            for offset, side in zip((rows, columns), self.pretrained_grid, strict=True)
        ]
        apart = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1)
        place = (apart.sign() * (apart.abs() + 1).log2() / math.log2(REACH)).to(weight.dtype)
        return self.cpb_fc2(self.cpb_fc1(place).relu()).permute(2, 0, 1)

    def bias_macs(self, rows: int, columns: int) -> int:
        """Return the multiply-adds of a bias table."""
        return rows * columns * (self.cpb_fc1.weight.numel() + self.cpb_fc2.weight.numel())

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, pretrained_grid={self.pretrained_grid}"
