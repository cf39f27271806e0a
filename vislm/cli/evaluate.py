"""``vislm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Model, Prune, interventions, load


def evaluate(
    benchmark: Annotated[str, typer.Argument(help="pope or chair.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with instances.json and images/.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a killed run in it is resumed.")],
    model: Model = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N samples.")] = None,
    control: Annotated[str, typer.Option("--control", help="none, or grey: every picture replaced by grey.")] = "none",
    on_error: Annotated[str, typer.Option("--on-error", help="stop or skip at broken images.")] = "stop",
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Run a benchmark: one JSON line per finished sample, then results.json and a table."""
    from typing import get_args

    from vislm.errors import UnknownName
    from vislm.eval.benchmarks import Control, load_benchmark
    from vislm.eval.runner import run
    from vislm.report.tables import metrics_table

    methods = interventions(prune, heads)
    if control not in get_args(Control):
        raise UnknownName("control", control, get_args(Control))
    task = load_benchmark(benchmark, data, control=control)  # pyright: ignore[reportArgumentType]
    lmm = load(model, dtype, device)
    with lmm.using(*methods):
        results = run(task, lmm, out, batch_size=batch_size, limit=limit, on_error=on_error, progress=True)
    typer.echo(metrics_table(results))
    typer.echo(f"written to {out / 'results.json'}")
