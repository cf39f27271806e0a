"""Public figures of the cards that kernels are audited for, and what follows from them: occupancy and time bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Card:
    """One card of a compute capability.

    Attributes:
        name: as sold.
        tensor_flops: dense bf16/fp16 tensor-core FLOP/s, without sparsity.
        flops: float32 FLOP/s outside of tensor cores.
        bandwidth: of the memory, bytes/s.
        processors: streaming multiprocessors.
        lanes: float32 multiply-adds of one multiprocessor per clock.
        shared_per_block: bytes of shared memory that one block may use.
        shared_per_processor: bytes of shared memory of one multiprocessor.
        tensor_memory: columns of tensor memory of one multiprocessor; 0 = has none.

    Source: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and HGX B200; CUDA C++ Programming Guide, technical
    specifications per compute capability.
    """

    name: str
    tensor_flops: float
    flops: float
    bandwidth: float
    processors: int
    lanes: int
    shared_per_block: int
    shared_per_processor: int
    tensor_memory: int = 0

    @property
    def exponentials(self) -> float:
        """Exponentials per second: 16 per multiprocessor and clock, at the clock that ``flops`` is stated for."""
        return self.flops / (2 * self.lanes) * 16


CARDS = {
    80: Card("A100 80GB SXM", 312e12, 19.5e12, 2.039e12, 108, 64, 163 << 10, 164 << 10),
    90: Card("H100 SXM", 989e12, 66.9e12, 3.35e12, 132, 128, 227 << 10, 228 << 10),
    100: Card("B200", 2250e12, 75e12, 8.0e12, 148, 128, 227 << 10, 228 << 10, 512),
}

REGISTERS = 65536
WARPS = 64
BLOCKS = 32
RESERVED_SHARED = 1 << 10
"""Of one multiprocessor of any card: registers, resident warps and blocks; shared memory that a block costs besides."""


def resident_blocks(card: Card, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Return how many blocks one multiprocessor holds at once; registers are handed out by 256 per warp."""
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    limits = [BLOCKS, WARPS // warps, REGISTERS // (per_warp * warps)]
    limits.append(card.shared_per_processor // (shared + RESERVED_SHARED))
    if tensor_memory:
        limits.append(card.tensor_memory // tensor_memory)
    return min(limits)


class Bound(NamedTuple):
    """Seconds that a problem takes at least, and what sets them."""

    seconds: float
    limit: str


def ideal_bound(card: Card, precision: str, flops: float, bytes: float) -> Bound:
    """Return the bound of the problem itself: its FLOPs at peak, or its bytes at full bandwidth."""
    peak = card.flops if precision == "fp32" else card.tensor_flops
    return max(Bound(flops / peak, "arithmetic"), Bound(bytes / card.bandwidth, "memory"))


def tile_bound(
    card: Card, precision: str, flops: float, bytes: float, exponentials: float, programs: int, resident: int
) -> Bound:
    """Return the bound of the tiles: their FLOPs and exponentials, the last wave of blocks as long as a full one."""
    if resident == 0:
        return Bound(math.inf, "does not fit")
    peak = card.flops if precision == "fp32" else card.tensor_flops
    waves = programs / (card.processors * resident)
    stretch = math.ceil(waves) / waves if waves > 1 else 1.0
    computing = max(Bound(flops / peak, "arithmetic"), Bound(exponentials / card.exponentials, "exponentials"))
    if waves <= 1:  # fewer blocks than fit: idle multiprocessors
        stretch = max(1.0, card.processors / programs)
    return max(Bound(computing.seconds * stretch, computing.limit), Bound(bytes / card.bandwidth, "memory"))
