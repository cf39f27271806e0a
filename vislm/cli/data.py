"""``vislm data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Make and check data sets."""


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


@app.command()
def check(
    benchmark: Annotated[
        str, typer.Argument(metavar="BENCHMARK[:OPTION=VALUE,...]", help="e.g. pope, or textvqa:ocr=true.")
    ],
    path: Annotated[Path, typer.Argument(help="The data set's folder.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, too.")] = False,
    show: Annotated[int, typer.Option("--show", min=1, help="How many faults to list.")] = 20,
) -> int:
    """Say what a benchmark's folder lacks and what is broken in it; exit code 1 if anything is."""
    from vislm.eval.checks import check_folder

    report = check_folder(benchmark, path, decode=decode)
    for title, lines in (("fault", report.faults), ("unusual", report.suspicions)):
        for line in lines[:show]:
            typer.echo(f"{title}: {line}")
        if len(lines) > show:
            typer.echo(f"... and {len(lines) - show} more; --show {len(lines)} lists them")
    summary = f"{report.benchmark}: {report.samples} samples, {report.pictures} pictures"
    typer.echo(f"{summary}, {len(report.faults)} faults, {len(report.suspicions)} unusual")
    return 1 if report.faults else 0
