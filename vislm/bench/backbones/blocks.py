"""Neighborhood attention's block beside timm's Swin block of the same width, at the maps of Swin-T and NAT-T."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vislm.backbones.blocks import PreNorm
from vislm.backbones.config import HierarchicalConfig
from vislm.backbones.variants import variant
from vislm.bench.kernels.timing import interleaved
from vislm.report.units import milliseconds_text

WIDTHS = {"swin_tiny": (96, 192, 384, 768), "nat_tiny": (64, 128, 256, 512)}
SIDES, HEAD_DIM, WINDOW, MLP_RATIO = (56, 28, 14, 7), 32, 7, 4
_OURS, _PEER = "ours", "timm"


@dataclass(frozen=True)
class BlockRow:
    """Two blocks of ours and two of Swin's, one plain and one shifted, in one direction; seconds are the fastest round.

    Attributes:
        widths: whose widths, "swin_tiny" or "nat_tiny".
        dim: width C.
        side: of the map.
        batch: maps at once.
        training: forward and backward.
        ours: seconds of two blocks.
        peer: seconds of two blocks.
    """

    widths: str
    dim: int
    side: int
    batch: int
    training: bool
    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        """Our time over timm's."""
        return self.ours / self.peer


def measure_blocks(batch: int, repeats: int, budget: float) -> Iterator[BlockRow]:
    """Yield the rows of all stages, for inference and for training.

    Args:
        batch: maps at once.
        repeats: rounds at most.
        budget: seconds per row after which no further round starts.
    """
    for widths, dims in WIDTHS.items():
        for dim, side in zip(dims, SIDES, strict=True):
            pair = {_OURS: our_blocks(dim, side), _PEER: swin_blocks(dim, side)}
            tokens = torch.randn(batch, side**2, dim, generator=torch.Generator().manual_seed(0))
            for training in (False, True):
                calls = {name: block_call(block, tokens, training) for name, block in pair.items()}
                seconds = interleaved(calls, repeats, budget)
                fastest = {name: min(times) for name, times in seconds.items()}
                yield BlockRow(widths, dim, side, batch, training, fastest[_OURS], fastest[_PEER])


def our_blocks(dim: int, side: int) -> Callable[[Tensor], Tensor]:
    """Return two blocks of NAT with Swin's feed-forward width, as a map of tokens ``(B, N, C)``."""
    config = cast(HierarchicalConfig, variant("nat_tiny").configured(ffn={"name": "mlp", "ratio": MLP_RATIO}))
    stage = type(config.stages[0])(dim=dim, depth=2, num_heads=dim // HEAD_DIM)
    mixer = {**config.mixer, "window_size": WINDOW}
    pair = nn.ModuleList(PreNorm(config, stage, mixer, 0.0) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        for block in pair:
            x = block(x, (side, side))
        return x

    return run


def swin_blocks(dim: int, side: int) -> Callable[[Tensor], Tensor]:
    """Return timm's plain and shifted block, as a map of tokens ``(B, N, C)``."""
    from timm.models.swin_transformer import SwinTransformerBlock

    pair = nn.Sequential(
        *(
            SwinTransformerBlock(
                dim, (side, side), dim // HEAD_DIM, window_size=WINDOW, shift_size=shift, mlp_ratio=MLP_RATIO
            )
            for shift in (0, WINDOW // 2)
        )
    )
    return lambda x: pair(x.unflatten(1, (side, side))).flatten(1, 2)


def block_call(block: Callable[[Tensor], Tensor], tokens: Tensor, training: bool) -> Callable[[], object]:
    """Return the call of blocks on tokens ``(B, N, C)``: inference, or forward and backward."""

    def infer() -> Tensor:
        with torch.inference_mode():
            return block(tokens)

    given = tokens.clone().requires_grad_()

    def train() -> None:
        block(given).square().mean().backward()

    return train if training else infer


def block_table_row(row: BlockRow) -> dict[str, str]:
    """Return a row of the printed table."""
    return {
        "widths of": row.widths,
        "dim": str(row.dim),
        "map": f"{row.side}x{row.side}",
        "batch": str(row.batch),
        "direction": "fwd+bwd" if row.training else "fwd",
        "ours": milliseconds_text(row.ours),
        "timm's Swin": milliseconds_text(row.peer),
        "time x": f"{row.ratio:.2f}",
    }
