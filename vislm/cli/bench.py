"""``vislm bench``."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Measure speed and memory; every figure is a ratio of two things timed in one process.")


@app.callback()
def _bench() -> None:
    """Measure speed and memory."""


@app.command()
def startup(runs: Annotated[int, typer.Option("--runs", min=1, help="Fresh interpreters of each kind.")] = 7) -> None:
    """Time ``vislm --help`` and ``import vislm`` against a bare interpreter."""
    from vislm.bench.startup import startup_lines

    for line in startup_lines(runs):
        typer.echo(line)


@app.command()
def statistics(
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Sequence length.")] = 1024,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 16,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    runs: Annotated[int, typer.Option("--runs", min=1)] = 7,
) -> None:
    """Time attention with statistics against plain SDPA and against the explicit matrix."""
    from vislm.bench.statistics import statistics_lines

    for line in statistics_lines(tokens, heads, head_dim, runs):
        typer.echo(line)
