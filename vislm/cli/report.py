"""``vislm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of vislm eval; the first is A.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html, report.md and report.tex.")] = Path(
        "out/report"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[BENCHMARK[:OPTION=VALUE,...]=]FOLDER",
            help="Where the pictures lie: what vislm eval was given, or any folder of pictures. May be repeated.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Samples to show of each benchmark.")] = 120,
    title: Annotated[str, typer.Option("--title", help="Headline of the page.")] = "Evaluation",
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Draws of the bootstrap.")] = 2000,
) -> None:
    """Write tables (Markdown, LaTeX) and one self-contained page with plots and samples about one or more runs.

    Runs on the same samples stand side by side, with paired differences to the first of them and the samples that
    flipped.
    """
    from vislm.report.runs.write import write_run_report

    for path in write_run_report(runs, out, data=data or (), samples=samples, title=title, resamples=resamples):
        typer.echo(f"written to {path}")
