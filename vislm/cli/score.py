"""``vislm score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK[:OPTION=VALUE,...]", help="As given to vislm eval.")],
    predictions: Annotated[
        Path, typer.Argument(help='predictions.jsonl of a run, or any JSON lines with "id" and "text".')
    ],
    data: Annotated[Path, typer.Option("--data", metavar="FOLDER", help="The benchmark's data.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Score what is there; otherwise every sample must have a row.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write the results here.")
    ] = None,
) -> None:
    """Score answers again, without a model: another parser, or what another program has answered."""
    from vislm.eval.running.runner import rescore
    from vislm.eval.specs import open_benchmark
    from vislm.files import atomic_write
    from vislm.report.tables import metrics_table

    results = rescore(open_benchmark(benchmark, data), predictions, allow_partial=partial)
    typer.echo(metrics_table(results))
    if out is not None:
        with atomic_write(out) as handle:
            json.dump(results, handle, indent=1)
        typer.echo(f"written to {out}")
