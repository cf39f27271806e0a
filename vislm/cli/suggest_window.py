"""``vislm suggest-window``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from vislm.cli._sizes import parse_sizes, sizes_text

if TYPE_CHECKING:
    from vislm.kernels import Neighborhood
    from vislm.kernels.simulator import Speedup, Suggestion

_TILE_TOKENS = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
_EACH = "one number, or one per axis"


def suggest_window(
    grid: Annotated[str, typer.Option("--grid", metavar="HxW", help="Tokens along each axis, such as 56x56.")],
    window: Annotated[str, typer.Option("--window", metavar="HxW", help=f"The window that is wanted: {_EACH}.")],
    tiles: Annotated[
        str | None, typer.Option("--tiles", metavar="HxW", help=f"Queries of a tile: {_EACH}. Default: 64 tokens.")
    ] = None,
    key_tiles: Annotated[
        str | None, typer.Option("--key-tiles", metavar="HxW", help="Keys of a tile; default: as --tiles.")
    ] = None,
    tiling: Annotated[
        str, typer.Option("--tiling", help="static: keys are cut into tiles once; dynamic: from each window's start.")
    ] = "static",
    dilation: Annotated[str, typer.Option("--dilation", metavar="HxW", help=f"Step between keys: {_EACH}.")] = "1",
    reach: Annotated[
        str | None, typer.Option("--reach", metavar="HxW", help="How far windows may be off; default: a key tile.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Nearest windows to show.")] = 8,
    strides: Annotated[int, typer.Option("--strides", min=1, help="Strides to show per window.")] = 3,
) -> None:
    """Propose strides and nearby windows whose savings in FLOPs become time: the fully block-sparse ones."""
    from vislm.kernels import Neighborhood
    from vislm.kernels.simulator import simulate, suggest_windows
    from vislm.report.tables import text_table

    sizes = parse_sizes("--grid", grid)
    axes = len(sizes)
    wanted = Neighborhood(
        sizes, parse_sizes("--window", window, axes), dilation=parse_sizes("--dilation", dilation, axes)
    )
    query_tile = _TILE_TOKENS[axes] if tiles is None else parse_sizes("--tiles", tiles, axes)
    key_tile = query_tile if key_tiles is None else parse_sizes("--key-tiles", key_tiles, axes)
    found = suggest_windows(
        wanted,
        query_tile,
        key_tile,
        reach=None if reach is None else parse_sizes("--reach", reach, axes),
        tiling=tiling,  # pyright: ignore[reportArgumentType]
    )
    shown = list(_nearest(found, windows, strides))
    rows = [_row(wanted, simulate(wanted, query_tile, key_tile), tiling)]
    rows += [_row(suggestion.pattern, suggestion.speedup, tiling) for suggestion in shown]
    typer.echo(f"grid {sizes_text(sizes)}, tiles of {sizes_text(query_tile)} queries and {sizes_text(key_tile)} keys")
    typer.echo(text_table(rows))
    for line in _remarks(wanted, key_tile, found, len(shown)):
        typer.echo(line)


def _nearest(found: list[Suggestion], windows: int, strides: int) -> Iterator[Suggestion]:
    """Yield the first strides of the first windows."""
    by_window = [list(group) for _, group in groupby(found, key=lambda suggestion: suggestion.pattern.window)]
    for group in by_window[:windows]:
        yield from group[:strides]


def _row(pattern: Neighborhood, speedup: Speedup, tiling: str) -> dict[str, str]:
    free = speedup.block_sparse if tiling == "static" else speedup.dynamic_block_sparse
    return {
        "window": sizes_text(pattern.window),
        "stride": sizes_text(pattern.stride),
        "FLOP bound": f"{speedup.flop_bound:.2f}",
        "static keys": f"{speedup.static_bound:.2f}",
        "dynamic keys": f"{speedup.dynamic_bound:.2f}",
        "block-sparse": "fully" if free else "no",
    }


def _remarks(wanted: Neighborhood, key_tile: tuple[int, ...], found: list[Suggestion], shown: int) -> Iterator[str]:
    yield "bounds on the speed-up over dense attention; the first row is the window that was asked for, with stride 1"
    partial = [axis for axis, (size, tile) in enumerate(zip(wanted.window, key_tile, strict=True)) if size % tile]
    if partial:
        yield (
            f"window {sizes_text(wanted.window)} holds no whole number of key tiles {sizes_text(key_tile)}, so that no "
            "stride makes it fully block-sparse; other windows do"
            if found
            else f"window {sizes_text(wanted.window)} holds no whole number of key tiles {sizes_text(key_tile)}"
        )
    if not found:
        yield "nothing near it is fully block-sparse on this grid; try other --tiles, or a larger --reach"
    elif len(found) > shown:
        yield f"{len(found) - shown} more: --windows, --strides"
