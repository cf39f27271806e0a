"""Super-token attention: tokens are averaged into soft superpixels, these attend to each other, tokens read them back.

Source: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167); https://github.com/hhb072/STViT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vislm.attention.super_token_refine import AttentionRefine, ConvRefine
from vislm.attention.tokens import check_tokens, crop_grid, on_grid, pad_grid, per_axis
from vislm.errors import UnknownName, UsageError
from vislm.kernels.super_token import SuperTokens, sample_super_tokens, spread

REFINES = ("attention", "conv", "none")


class SuperTokenAttention(nn.Module):
    """``Q refine(S)`` with super tokens ``S`` sampled from x, and ``Q`` the association of tokens with super tokens.

    A grid that is no multiple of the cell is padded with zero tokens, which take part (as published). Cells of one
    token are attention among all tokens: nothing is sampled.

    Args:
        dim: width C.
        num_heads: H of the attention among super tokens; ``head_dim = C / H``.
        stoken_size: tokens along each side of a super token's cell, one number or (height, width).
        n_iter: updates of the association, 1 or more.
        refine: ``"attention"`` among super tokens, ``"conv"`` (1x1, depthwise 5x5, 1x1), or ``"none"``.
        qkv_bias: bias of the joint projection.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``; the association has always ``C ** -0.5``.
        attn_drop: dropout of the attention weights; in training it forms all of them.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: no super tokens are made of them, but they take part in
            the attention among super tokens. Other refinements return them as they are.

    The state dict has the official names: ``stoken_refine.qkv, stoken_refine.proj``, 1x1 convolutions; qkv's rows are
    ``[q | k | v]`` of the first head, then of the next.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int | Sequence[int] = 8,
        *,
        n_iter: int = 1,
        refine: Literal["attention", "conv", "none"] = "attention",
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        height, width = per_axis("stoken_size", stoken_size, 2)
        if min(height, width, n_iter) < 1:
            raise UsageError(f"{stoken_size=}, {n_iter=}, expected 1 or more")
        if refine not in REFINES:
            raise UnknownName("refine", refine, REFINES)
        self.dim, self.num_heads, self.n_iter, self.num_prefix_tokens = dim, num_heads, n_iter, num_prefix_tokens
        self.stoken_size, self.refine = (height, width), refine
        self.stoken_refine = None
        if refine == "attention":
            self.stoken_refine = AttentionRefine(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        elif refine == "conv":
            self.stoken_refine = ConvRefine(dim, num_prefix_tokens)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid, prefix = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2), self.num_prefix_tokens
        if self.stoken_size == (1, 1):
            return x if self.stoken_refine is None else self.stoken_refine(x, grid)
        padded, cells = self.cells(grid)
        super_tokens, association = self.sample(x, grid)
        refined = torch.cat((x[:, :prefix], super_tokens), dim=1)
        if self.stoken_refine is not None:
            refined = self.stoken_refine(refined, cells)
        x = on_grid(refined, prefix, lambda s: spread(s, association, padded, self.stoken_size))
        return crop_grid(x, padded, grid, prefix)

    def sample(self, x: Tensor, grid: Sequence[int]) -> SuperTokens:
        """Return the super tokens ``S (B, M, C)`` and the association ``Q (B, N', 9)``, N' tokens of the padded grid.

        Args:
            x: as for :meth:`forward`.
            grid: ``(H, W)``.
        """
        padded, _ = self.cells(grid)
        pixels = pad_grid(x[:, self.num_prefix_tokens :], grid, padded)
        return sample_super_tokens(pixels, padded, self.stoken_size, iterations=self.n_iter)

    def tessellation(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return which super token each token of the grid belongs to most, ``(B, H, W)`` from 0 to M - 1.

        Args:
            x: as for :meth:`forward`.
            grid: ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2)
        (height, width), (rows, columns) = self.cells(grid)
        association = self.sample(x, grid).association.unflatten(1, (height, width))[:, : grid[0], : grid[1]]
        around = torch.arange(-1, 2, device=x.device)
        row = (torch.arange(grid[0], device=x.device) // self.stoken_size[0])[:, None] + around
        column = (torch.arange(grid[1], device=x.device) // self.stoken_size[1])[:, None] + around
        inside = ((row >= 0) & (row < rows))[:, None, :, None] & ((column >= 0) & (column < columns))[None, :, None]
        nearest = association.masked_fill(~inside.flatten(2), -1.0).argmax(-1)
        return (row[:, :1] + nearest // 3) * columns + column[:, 0] + nearest % 3

    def cells(self, grid: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the grid padded to whole cells, and how many cells there are along each axis."""
        rows, columns = (math.ceil(size / cell) for size, cell in zip(grid, self.stoken_size, strict=True))
        return (rows * self.stoken_size[0], columns * self.stoken_size[1]), (rows, columns)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: association, super tokens, refinement and reading back."""
        padded, cells = self.cells(grid)
        sparse = 0 if self.stoken_size == (1, 1) else (2 * self.n_iter + 1) * 9 * math.prod(padded) * self.dim
        if self.stoken_refine is None:
            return sparse
        return sparse + self.stoken_refine.macs(math.prod(cells), self.num_prefix_tokens)

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, stoken_size={self.stoken_size}, n_iter={self.n_iter}, "
            f"refine={self.refine!r}, num_prefix_tokens={self.num_prefix_tokens}"
        )
