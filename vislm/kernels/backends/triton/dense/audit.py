"""The dense kernels as they are launched for typical problems, for the ahead-of-time audit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.backends.triton.audit_case import TARGETS, AuditCase
from vislm.kernels.backends.triton.audit_launch import case_of
from vislm.kernels.backends.triton.dense import MAX_FLOAT32_TRAINING
from vislm.kernels.backends.triton.dense.autograd import DenseAttention
from vislm.kernels.backends.triton.dense.call import Call, Operands
from vislm.kernels.backends.triton.dense.measure import received_by_keys, row_statistics
from vislm.kernels.backends.triton.launching import Launch, recorded
from vislm.kernels.request import CheckedStatistics

WIDTHS = (32, 64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH, TOKENS, CHANNELS = 8, 2048, 1024

_PRODUCTS = {
    "forward_kernel": (2, 2),
    "delta_kernel": (0, 0),
    "backward_queries_kernel": (1, 3),
    "backward_keys_kernel": (4, 4),
    "backward_bias_kernel": (0, 2),
    "row_statistics_kernel": (1, 1),
    "received_kernel": (1, 1),
}
"""Matrix products of N x N x D that a kernel adds to what the others have computed, and those that it does."""


class Variant(NamedTuple):
    """Which terms a call has."""

    name: str
    causal: bool = False
    key_logits: bool = False
    bias: bool = False
    sigmoid: bool = False


VARIANTS = (
    Variant(""),
    Variant(", causal, padded", causal=True, key_logits=True),
    Variant(", causal, padded, bias", causal=True, key_logits=True, bias=True),
)
SIGMOID = Variant(", sigmoid", sigmoid=True)


def audit_cases() -> list[AuditCase]:
    """Return one case per kernel, card, dtype, head_dim and variant; of sigmoid attention one size only."""
    cases: list[AuditCase] = []
    for target in TARGETS:
        for dtype in DTYPES:
            for width in WIDTHS:
                for variant in VARIANTS if dtype == "bf16" else (VARIANTS[0], VARIANTS[-1]):
                    cases += cases_of(target, dtype, width, variant)
        cases += cases_of(target, "bf16", 64, SIGMOID)
    return cases


def cases_of(target: int, dtype: str, width: int, variant: Variant) -> Iterator[AuditCase]:
    """Yield the cases of all launches of one call."""
    heads = CHANNELS // width
    pairs = BATCH * heads * TOKENS * (TOKENS // 2 if variant.causal else TOKENS)
    for launch in _launches(target, DTYPES[dtype], width, heads, variant):
        kernel = launch.kernel.__name__
        needed, done = _PRODUCTS[kernel]
        yield case_of(
            launch,
            target,
            name=f"dense {kernel.removesuffix('_kernel')} {dtype} D={width}{variant.name}",
            problem=f"{BATCH} x {heads} heads x {TOKENS} tokens x {width}",
            flops=2.0 * needed * width * pairs,
            tile_flops=2.0 * done * width * pairs,
            exponentials=pairs if done else 0,
            precision="fp32" if dtype == "fp32" or not done else dtype,
        )


def _launches(target: int, dtype: torch.dtype, width: int, heads: int, variant: Variant) -> list[Launch]:
    """Return the launches of forward, backward and all statistics."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(BATCH, heads, TOKENS, width) for _ in range(3))
    bias = empty(1, heads, TOKENS, TOKENS) if variant.bias else None
    key_logits = empty(BATCH, 1, TOKENS, dtype=torch.float32) if variant.key_logits else None
    call = Call(variant.causal, width**-0.5, offset=-7.6 if variant.sigmoid else None)
    operands = Operands(query, key, value, bias, key_logits)
    groups = {"first": empty(1, TOKENS, dtype=torch.bool), "second": empty(BATCH, TOKENS, dtype=torch.bool)}
    wanted = CheckedStatistics(False, None, True, None, None, groups, True, True, False)
    counted = empty(BATCH, TOKENS, dtype=torch.float32) if variant.key_logits else None
    trained = dtype != torch.float32 or width <= MAX_FLOAT32_TRAINING
    leaves = [tensor.requires_grad_() for tensor in operands if tensor is not None and trained]
    with recorded(target) as launches:
        output, log_sum = DenseAttention.apply(call, *operands)
        if trained:
            torch.autograd.grad(output.sum(), leaves)
        row_statistics(call, operands, log_sum, wanted)
        received_by_keys(call, operands, log_sum, counted)
    return launches
