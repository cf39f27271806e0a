"""``vislm calibrate-heads``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Model, load


def calibrate_heads(
    what: Annotated[
        str,
        typer.Option("--what", "-w", help="sinks (for var), ad_hh, act or zerotuning: whose offline file is made."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE.json", help="To write; a killed search goes on from its journal."),
    ],
    model: Model = "vislm-tiny",
    samples: Annotated[
        str,
        typer.Option("--samples", metavar="scenes|DIR", help="Generated scenes, or a folder with a samples.jsonl."),
    ] = "scenes",
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Calibration samples.")] = 100,
    question: Annotated[
        str, typer.Option("--question", help="About pictures of a folder that come without one.")
    ] = "Describe the image.",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Heads that are tried in one forward.")] = 16,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="2-30", help="Decoder layers to search, such as 1+18-31.")
    ] = None,
    score: Annotated[
        str, typer.Option("--score", help="act, zerotuning: accuracy, likelihood, or entropy (needs no answers).")
    ] = "accuracy",
    tau: Annotated[float, typer.Option("--tau", help="sinks: least mean activation.")] = 20.0,
    top: Annotated[int, typer.Option("--top", min=1, help="ad_hh: heads in the list.")] = 20,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="ad_hh: length of a caption.")] = 128,
    beta: Annotated[float, typer.Option("--beta", help="act: fraction that a sink keeps.")] = 0.4,
    threshold: Annotated[float, typer.Option("--threshold", help="act: mean attention of a sink.")] = 0.1,
    up: Annotated[float, typer.Option("--up", help="zerotuning: factor above 1 that heads are tried with.")] = 1.5,
    down: Annotated[float, typer.Option("--down", help="zerotuning: factor below 1 that heads are tried with.")] = 0.6,
    gammas: Annotated[
        str, typer.Option("--gammas", help="zerotuning: factors to choose from.")
    ] = "0.2+0.4+0.6+0.8+1.25+1.5+2+3",
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Find what a head method needs to know of a model beforehand: sink dimensions, heads, or head factors."""
    from vislm.calibration.run import calibrate_heads as run
    from vislm.calibration.samples import load_samples
    from vislm.calibration.settings import Settings
    from vislm.data.scene_categories import CATEGORIES
    from vislm.eval.captions.vocabulary import coco_vocabulary, vocabulary_of
    from vislm.registry import parse_value

    settings = Settings(
        what=what,  # pyright: ignore[reportArgumentType]
        seed=seed,
        batch_size=batch_size,
        layers=None if layers is None else parse_value(layers, tuple[int, ...], "--layers"),
        score=score,  # pyright: ignore[reportArgumentType]
        tau=tau,
        top=top,
        max_new_tokens=max_new_tokens,
        beta=beta,
        threshold=threshold,
        up=up,
        down=down,
        gammas=parse_value(gammas, tuple[float, ...], "--gammas"),
    )
    settings.check()
    chosen = load_samples(samples, num_samples, seed, question, captions=what in ("sinks", "ad_hh"))
    vocabulary = vocabulary_of(CATEGORIES) if samples == "scenes" else coco_vocabulary()
    entries = run(load(model, dtype, device), chosen, settings, out, vocabulary, progress=True)
    method, option = {"sinks": ("var", "dims"), "zerotuning": ("zerotuning", "factors")}.get(what, (what, "heads"))
    typer.echo(f"{len(entries)} entries: {'+'.join(_text(entry) for entry in entries) or 'nothing raises the score'}")
    typer.echo(f"written to {out}; use: --heads {method}:{option}={out}")


def _text(entry: object) -> str:
    return "/".join(map(str, entry)) if isinstance(entry, (list, tuple)) else str(entry)
