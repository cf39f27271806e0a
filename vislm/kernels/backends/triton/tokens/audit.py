"""The token and super-token kernels as they are launched for typical problems, for the ahead-of-time audit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vislm.kernels.backends.triton.audit_case import TARGETS, AuditCase
from vislm.kernels.backends.triton.audit_launch import case_of
from vislm.kernels.backends.triton.launching import recorded
from vislm.kernels.backends.triton.super_token import fused_association, fused_spreads, fused_sums
from vislm.kernels.backends.triton.tokens import fused_combine, fused_gather
from vislm.kernels.super_token_cells import CellGrid

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH, TOKENS, KEPT, CHANNELS = 64, 577, 288, 1024
CELLS, WIDTH = CellGrid(7, 7, 8, 8), 64
NEIGHBOURS = 9


def audit_cases() -> list[AuditCase]:
    """Return one case per kernel, card and dtype; kernels that a backward pass launches again are not repeated."""
    return [
        case for target in TARGETS for dtype in DTYPES for case in (*_tokens(target, dtype), *_cells(target, dtype))
    ]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _tokens(target: int, dtype: str) -> Iterator[AuditCase]:
    tokens, sizes = _empty(BATCH, TOKENS, CHANNELS, dtype=DTYPES[dtype]), _empty(BATCH, TOKENS, dtype=torch.float32)
    with recorded(target) as launches:
        fused_gather(tokens, _empty(BATCH, KEPT, dtype=torch.int64))
        merged = fused_combine(tokens, sizes, _empty(BATCH, TOKENS, dtype=torch.int64), KEPT)
        torch.autograd.grad(merged, (tokens, sizes), torch.empty_like(merged))
    per_number = {"gather_kernel": 0, "combine_kernel": 2, "combine_backward_kernel": 3}
    for launch in launches:
        kernel = launch.kernel.__name__
        yield case_of(
            launch,
            target,
            name=f"tokens {kernel.removesuffix('_kernel')} {dtype}",
            problem=f"{BATCH} x {TOKENS} tokens x {CHANNELS}, {KEPT} left",
            flops=per_number[kernel] * BATCH * TOKENS * CHANNELS,
            precision="fp32",
        )


def _cells(target: int, dtype: str) -> Iterator[AuditCase]:
    num_cells = CELLS.rows * CELLS.columns
    num_tokens = num_cells * CELLS.height * CELLS.width
    tokens, centres = (_empty(BATCH, size, WIDTH, dtype=DTYPES[dtype]) for size in (num_tokens, num_cells))
    with recorded(target) as launches:
        association = fused_association(tokens, centres, CELLS, WIDTH**-0.5)
        fused_sums(tokens, association, CELLS)
        fused_spreads(centres, association, CELLS)
    for launch in launches:
        kernel = launch.kernel.__name__
        products = kernel == "products_kernel"
        yield case_of(
            launch,
            target,
            name=f"super tokens {kernel.removesuffix('_kernel')} {dtype}",
            problem=f"{BATCH} x {num_tokens} tokens x {WIDTH}, {num_cells} cells",
            flops=2.0 * NEIGHBOURS * BATCH * num_tokens * WIDTH,
            exponentials=NEIGHBOURS * BATCH * num_tokens if products else 0,
            precision=dtype if products else "fp32",
        )
