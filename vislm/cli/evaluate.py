"""``vislm eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vislm.cli._options import Device, Dtype, Heads, Prune

if TYPE_CHECKING:
    from vislm.eval.protocol import Benchmark, Subject


def evaluate(
    benchmarks: Annotated[
        list[str],
        typer.Argument(metavar="BENCHMARK[:OPTION=VALUE,...]...", help="e.g. pope:suffix=short; see vislm list."),
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="[BENCHMARK=]FOLDER", help="Its data; for several benchmarks, repeat NAME=."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Run folder; a killed run in it is resumed. Several: one folder each.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|HUB|NAME@WEIGHTS",
            help="vislm-tiny, a local folder, or a hub name. Vision benchmarks: NAME@FILE.safetensors, "
            "NAME@pretrained (timm) or NAME@TAG (open_clip), which may download, NAME@random, or a folder; "
            "options follow as :option=value,...; see vislm list models.",
        ),
    ] = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Threads that decode pictures ahead.")] = 2,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N samples.")] = None,
    control: Annotated[str, typer.Option("--control", help="none, or grey: every picture replaced by grey.")] = "none",
    on_error: Annotated[str, typer.Option("--on-error", help="stop or skip at broken pictures and rows.")] = "stop",
    dtype: Dtype = None,
    device: Device = "cpu",
    store_kept: Annotated[
        bool, typer.Option("--store-kept", help="Store which visual tokens were left, for vislm report to draw.")
    ] = False,
) -> None:
    """Run benchmarks: one JSON line per finished sample, then results.json and a table.

    Start it by ``accelerate launch -m vislm.eval ...`` to share the samples among processes and machines.
    """
    from vislm.eval.running.processes import launched, own_device
    from vislm.eval.running.runner import Options, run
    from vislm.eval.running.subjects import keep_tokens, open_subject
    from vislm.report.tables import metrics_table

    Options(batch_size, limit, on_error, workers)  # a wrong word should not cost the time to load a model
    tasks = _tasks(benchmarks, data, control)
    with launched() as world:
        for kind in dict.fromkeys(task.subject for task in tasks):
            with open_subject(kind, model, prune or (), heads or (), dtype, own_device(device)) as subject:
                if store_kept:
                    keep_tokens(subject)
                for task in (task for task in tasks if task.subject == kind):
                    folder = out / task.name if len(tasks) > 1 else out
                    options: dict[str, Any] = {
                        "batch_size": batch_size,
                        "on_error": on_error,
                        "workers": workers,
                        "progress": True,
                        "world": world,
                    }
                    results = run(_prepared(task, subject, folder, options), subject, folder, limit=limit, **options)
                    if world.is_first:
                        typer.echo(metrics_table(results))
                        _echo_broken(results["broken"])
                        typer.echo(f"written to {folder / 'results.json'}")


def _prepared(task: Benchmark, subject: Subject, folder: Path, options: dict[str, Any]) -> Benchmark:
    """Run what a benchmark needs first (k-NN: the training pictures' features), into OUT/train, whatever --limit is."""
    from vislm.eval.running.runner import run
    from vislm.eval.vision.knn import Knn

    if not isinstance(task, Knn) or task.votes.bank is not None:
        return task
    run(task.before, subject, folder / "train", **options)
    return task.after(folder / "train")


def _tasks(specs: Sequence[str], data: Sequence[str], control: str) -> list[Benchmark]:
    from typing import get_args

    from vislm.errors import UnknownName, UsageError
    from vislm.eval.protocol import Control
    from vislm.eval.specs import name_of, open_benchmark

    if control not in get_args(Control):
        raise UnknownName("control", control, get_args(Control))
    names = [name_of(spec) for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(
            f"a benchmark is named twice: {' '.join(names)}; give each variant a run and folder of its own"
        )
    folders = _folders(names, data)
    return [
        open_benchmark(spec, folders[name], control=control)  # pyright: ignore[reportArgumentType]
        for spec, name in zip(specs, names, strict=True)
    ]


def _folders(names: Sequence[str], data: Sequence[str]) -> dict[str, Path]:
    """Return benchmark -> data folder: NAME=FOLDER for one of them, FOLDER alone for the others."""
    from vislm.errors import UsageError

    named: dict[str, Path] = {}
    common: list[Path] = []
    for text in data:
        name, equals, folder = text.partition("=")
        if equals and name in names:
            named[name] = Path(folder)
        else:
            common.append(Path(text))
    missing = [name for name in names if name not in named]
    if len(common) > 1 or (missing and not common):
        raise UsageError(
            f"--data names {len(common)} folders for {', '.join(missing) or 'no further benchmark'}; give one folder "
            "for all, or NAME=FOLDER for each"
        )
    return {name: named[name] if name in named else common[0] for name in names}


def _echo_broken(broken: Sequence[dict[str, str]]) -> None:
    if broken:
        typer.echo(f"{len(broken)} samples left out:", err=True)
        for fault in broken[:20]:
            typer.echo(f"  {fault['id'] or 'row'}: {fault['error']}", err=True)
        if len(broken) > 20:
            typer.echo(f"  and {len(broken) - 20} more, listed in results.json", err=True)
