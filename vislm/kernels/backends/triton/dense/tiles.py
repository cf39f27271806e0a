"""Tile configurations of the dense kernels, per card, kernel, head_dim and size of the numbers.

Chosen with ``vislm bench gpu-audit``, not with a stopwatch: per entry the largest tile (most work per byte that is
read) that spills no register, fits into shared memory (99 KiB for 80, see :func:`target_of`) and keeps at least eight
warps on a multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vislm.kernels.backends.triton.launching import target_of


class DenseTile(NamedTuple):
    """``rows`` queries by ``columns`` keys per step, and how a program is cut into warps and pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The tile's sizes as kernel arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}


WIDTHS = (32, 64, 128, 256)
"""head_dim, rounded up, that the four entries of each line are for."""

_Line = tuple[tuple[int, int, int, int], ...]

SIXTEEN_BITS: dict[tuple[int, str], _Line] = {
    (80, "forward"): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    (80, "backward_queries"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    (80, "backward_keys"): ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    (80, "backward_bias"): ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    (80, "row_statistics"): ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    (80, "received"): ((64, 128, 4, 3), (64, 128, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2)),
    (90, "forward"): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2)),
    (90, "backward_queries"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    (90, "backward_keys"): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
    (90, "backward_bias"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    (90, "row_statistics"): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    (90, "received"): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)),
    (100, "forward"): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    (100, "backward_queries"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    (100, "backward_keys"): ((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
    (100, "backward_bias"): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    (100, "row_statistics"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
    (100, "received"): ((64, 128, 4, 3), (64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 2)),
}

FLOAT32: dict[str, _Line] = {
    "forward": ((32, 16, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
    "backward_queries": ((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    "backward_keys": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    "backward_bias": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "row_statistics": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "received": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
"""The same on every card: without tensor cores a tile's operands go through registers, which those of the gradients of
head_dim 256 do not fit into."""

WITHOUT_BIAS: dict[tuple[int, str, int], tuple[int, int, int, int]] = {
    (80, "backward_keys", 64): (64, 128, 8, 2),
    (90, "forward", 256): (128, 64, 8, 2),
    (90, "row_statistics", 128): (128, 128, 8, 2),
    (100, "forward", 64): (128, 128, 8, 3),
}
"""Larger tiles for 16-bit calls without a dense bias, which takes registers and shared memory."""

DELTA: _Line = ((128, 16, 4, 1), (128, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1))


def dense_tile(kernel: str, width: int, dtype: torch.dtype, biased: bool, device: torch.device) -> DenseTile:
    """Return the tile configuration of a kernel.

    Args:
        kernel: its name without ``_kernel``.
        width: the padded head_dim, of keys or values, whichever is larger: 16 to 256.
        dtype: of query, key and value.
        biased: whether there is a dense bias.
        device: where it will run.
    """
    index = WIDTHS.index(max(width, WIDTHS[0]))
    if kernel == "delta":
        return DenseTile(*DELTA[index])
    if dtype == torch.float32:
        return DenseTile(*FLOAT32[kernel][index])
    target = target_of(device)
    plain = None if biased else WITHOUT_BIAS.get((target, kernel, WIDTHS[index]))
    return DenseTile(*(plain or SIXTEEN_BITS[target, kernel][index]))
