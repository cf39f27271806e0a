"""``vislm data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make data sets.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Make data sets."""


@app.command()
def scenes(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write images/, instances.json, captions.json to.")
    ],
    seed: Annotated[int, typer.Option("--seed", help="Scene i of a seed is always the same scene.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of scenes.")] = 100,
    difficulty: Annotated[str, typer.Option("--difficulty", help="easy, hard or hard2.")] = "hard2",
    distribution: Annotated[str, typer.Option("--distribution", help="biased or flat.")] = "biased",
) -> None:
    """Generate annotated scenes in COCO's format, for calibration, validation and tests of the embedded model."""
    from vislm.data.scenes import write_scenes

    write_scenes(out, n, seed, difficulty=difficulty, distribution=distribution)  # pyright: ignore[reportArgumentType]
    typer.echo(f"{n} scenes written to {out}")
