"""``vislm tune-pruning``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Model, load


def tune_pruning(
    prune: Annotated[
        str,
        typer.Option(
            "--prune", "-p", metavar="METHOD[:OPTION=VALUE,...]|FILE", help="Options that you give are not searched."
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            "-b",
            help="0.25 (share of the visual tokens, on average over the layers), tokens=64, or flops=0.4. Repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; a killed one in it is continued.")],
    model: Model = "vislm-tiny",
    samples: Annotated[
        str, typer.Option("--samples", metavar="scenes|DIR", help="Generated scenes, or a folder (see docs/tuning.md).")
    ] = "scenes",
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Calibration samples.")] = 30,
    question: Annotated[
        str, typer.Option("--question", help="About the pictures of a folder that lists no questions.")
    ] = "Describe the image.",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Trials per budget, those of earlier starts included.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    sampler: Annotated[str, typer.Option("--sampler", help="gp (Gaussian process) or tpe.")] = "gp",
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", min=0.0, help="Weight of the first answer token's KL divergence.")
    ] = 0.0,
    search: Annotated[
        list[str] | None,
        typer.Option("--search", metavar="OPTION=LOW..HIGH|A|B", help="A range of your own. Repeatable."),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Find the options of a pruning method that change a model least within a budget; writes schedules for --prune."""
    from vislm.report.tables import text_table
    from vislm.tuning.results import row
    from vislm.tuning.run import Settings, tune_pruning
    from vislm.tuning.samples import load_samples

    settings = Settings(prune, budget, trials, seed, sampler, kl_weight, search or ())  # pyright: ignore[reportArgumentType]
    settings.check()
    chosen = load_samples(samples, num_samples, seed, question)
    results, paths = tune_pruning(load(model, dtype, device), chosen, settings, out, progress=True)
    columns = ("budget", "trial", "feasible", "discrepancy", "cosine", "kl", "tokens", "flops")
    shown = [row(r, tried) for r in results for tried in (r.defaults, r.best) if tried is not None]
    typer.echo(text_table(shown, columns))
    for result in results:
        if result.best is None:
            typer.echo(f"no trial stayed within {result.budget}; allow more, or search other options", err=True)
    for path in paths:
        typer.echo(f"written to {path}")
