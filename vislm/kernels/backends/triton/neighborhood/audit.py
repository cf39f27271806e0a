"""The neighborhood kernels as they are launched for typical problems, for the ahead-of-time audit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.backends.triton.audit_case import TARGETS, AuditCase
from vislm.kernels.backends.triton.audit_launch import case_of
from vislm.kernels.backends.triton.launching import Launch, recorded
from vislm.kernels.backends.triton.neighborhood.autograd import neighborhood_attention
from vislm.kernels.backends.triton.neighborhood.operands import Operands
from vislm.kernels.backends.triton.neighborhood.plan import key_tiles, query_tiles
from vislm.kernels.patterns.neighborhood import Neighborhood

BATCH, CHANNELS = 8, 768
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = {
    "neighborhood_forward": (2, 2),
    "neighborhood_backward_query": (1, 3),
    "neighborhood_backward_key": (4, 4),
}
"""Matrix products per pair that a kernel adds to what the others have computed, and those that it does."""


class Problem(NamedTuple):
    """A grid and its window, and which additive logits the call has."""

    name: str
    pattern: Neighborhood
    table: bool = False
    axial: bool = False
    key_logits: bool = False


PLANE, SOLID = Neighborhood((56, 56), 7), Neighborhood((16, 28, 28), (4, 7, 7))
COMMON = (Problem("2-D", PLANE), Problem("2-D, table", PLANE, table=True))
RARE = (
    Problem("1-D, causal, key logits", Neighborhood(4096, 256, causal=True), key_logits=True),
    Problem("2-D, fully block-sparse", Neighborhood((64, 64), 16, stride=16)),
    Problem("2-D, axial logits", PLANE, axial=True),
    Problem("3-D", SOLID),
    Problem("3-D, table", SOLID, table=True),
    Problem("3-D, axial logits", SOLID, axial=True),
)


def audit_cases() -> list[AuditCase]:
    """Return one case per kernel, card and problem, the common ones for all dtypes and head_dims."""
    cases: list[AuditCase] = []
    for target in TARGETS:
        for problem in COMMON:
            for dtype, widths in (("bf16", (32, 64, 128, 256)), ("fp32", (32, 64))):
                for width in widths:
                    cases += cases_of(target, dtype, width, problem)
        for problem in RARE:
            cases += cases_of(target, "bf16", 64, problem)
    return cases


def cases_of(target: int, dtype: str, width: int, problem: Problem) -> Iterator[AuditCase]:
    """Yield the cases of all launches of one call, forward and backward."""
    heads = CHANNELS // width
    pairs = BATCH * heads * _pairs(problem.pattern)
    operands = _operands(DTYPES[dtype], width, heads, problem)
    for launch in _launches(target, operands):
        kernel = launch.kernel.__name__
        needed, done = PRODUCTS[kernel]
        visited = BATCH * heads * _visited(launch, operands)
        size = "x".join(map(str, problem.pattern.grid))
        yield case_of(
            launch,
            target,
            name=f"{kernel.replace('_', ' ')} {dtype} D={width}, {problem.name}",
            problem=f"{BATCH} x {heads} heads x {size} tokens x {width}, window {problem.pattern.window}",
            flops=2.0 * needed * width * pairs,
            tile_flops=2.0 * done * width * visited,
            exponentials=visited,
            precision=dtype,
        )


def _operands(dtype: torch.dtype, width: int, heads: int, problem: Problem) -> Operands:
    pattern = problem.pattern
    num_tokens = math.prod(pattern.grid)
    entries = [2 * window - 1 for window in pattern.window]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_()

    return Operands(
        *(empty(BATCH, heads, num_tokens, width, dtype=dtype) for _ in range(3)),
        table=empty(heads, *entries) if problem.table else None,
        axial=tuple(empty(BATCH, heads, num_tokens, size) for size in entries) if problem.axial else (),
        key_logits=empty(BATCH, 1, num_tokens) if problem.key_logits else None,
        origins=tuple(window - 1 for window in pattern.window),
        pattern=pattern,
        scale=width**-0.5,
    )


def _launches(target: int, operands: Operands) -> list[Launch]:
    """Return the launches of forward and backward, with gradients of everything."""
    given = (operands.query, operands.key, operands.value, operands.table, operands.key_logits, *operands.axial)
    with recorded(target) as launches:
        output, lse = neighborhood_attention(operands)
        grads = (torch.empty_like(output), torch.empty_like(lse))
        torch.autograd.grad((output, lse), [tensor for tensor in given if tensor is not None], grads)
    return launches


def _pairs(pattern: Neighborhood) -> int:
    """Return the number of pairs (query, key) that attend."""
    counts = []
    for axis, size in enumerate(pattern.query_grid):
        first, last = pattern.span(axis, torch.arange(size))
        counts.append(int(((last - first) // pattern.step(axis) + 1).sum()))
    return math.prod(counts)


def _visited(launch: Launch, operands: Operands) -> int:
    """Return the number of pairs in all tiles of a launch, hidden ones and the tiles' empty places included."""
    kernel = launch.kernel.__name__.removeprefix("neighborhood_")
    tiles_of = key_tiles if kernel == "backward_key" else query_tiles
    tiles = tiles_of(operands.pattern, operands.config(kernel), operands.query.device)
    return tiles.steps * launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"]
