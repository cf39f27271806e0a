"""The tile shapes that the neighborhood kernels ship with, chosen by compiling ahead of time: none spills registers.

Not yet timed on a GPU.
"""

from __future__ import annotations

from typing import Literal

from vislm.kernels.backends.triton.neighborhood.plan import TileConfig

Kernel = Literal["forward", "backward_query", "backward_key"]


def tile_config(kernel: Kernel, widest: int, itemsize: int, gathers: int) -> TileConfig:
    """Return the tiles of a kernel.

    Args:
        kernel: which one.
        widest: channels of a head of queries or values, the larger of the two, as a power of two.
        itemsize: bytes per number.
        gathers: additive logits per pair that are looked up, 0 to 3; their addresses need many registers.
    """
    if itemsize == 4:
        return TileConfig(tokens=32, block=32, num_warps=8, num_stages=1)
    if widest > 128 and kernel != "forward":
        return TileConfig(tokens=32, block=32, num_warps=4 if kernel == "backward_query" else 8, num_stages=1)
    if widest > 128:
        return TileConfig(tokens=64, block=32, num_warps=8, num_stages=1)
    if kernel == "backward_key" or (gathers and kernel == "backward_query"):
        return TileConfig(tokens=64 if gathers < 3 else 32, block=32, num_warps=8, num_stages=2)
    few = (widest <= 64 and gathers < 2) or (kernel == "forward" and not gathers)
    return TileConfig(tokens=64, block=64, num_warps=4 if few else 8, num_stages=2)
