"""``vislm compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of vislm eval; two, or a sweep.")],
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Any number of runs: score with interval, tokens, FLOPs, milliseconds.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Draws of the bootstrap.")] = 2000,
) -> None:
    """Compare two runs on the same samples: A - B by paired bootstrap over pictures, and McNemar's test."""
    from vislm.errors import UsageError
    from vislm.eval import compare_tables as tables
    from vislm.eval.compare import compare as compared
    from vislm.eval.compare import read_run, unlike
    from vislm.eval.effects import notes
    from vislm.report.tables import markdown_table, text_table

    table = markdown_table if markdown else text_table
    if sweep:
        typer.echo(table(tables.sweep_rows([read_run(run) for run in runs], resamples=resamples)))
        return
    if len(runs) != 2:
        raise UsageError(f"{len(runs)} runs given; compare takes two, or any number with --sweep")
    a, b = map(read_run, runs)
    found = compared(a, b, resamples=resamples)
    fields = unlike(a, b)
    typer.echo(f"A = {runs[0]}, B = {runs[1]}, {a.results['benchmark']}, the same {len(a.rows)} samples\n")
    same = "A and B are the same model with the same methods"
    typer.echo(table(tables.config_rows(a, b, fields)) if fields else same)
    typer.echo(f"\n{table(tables.difference_rows(found))}\n\n{table(tables.mcnemar_rows(found))}")
    for note in notes(found):
        typer.echo(f"\nNote: {note}")
