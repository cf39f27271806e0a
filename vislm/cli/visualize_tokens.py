"""``vislm visualize tokens``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Model, Prune, interventions, load


def tokens(
    picture: Annotated[Path | None, typer.Argument(metavar="[IMAGE]", help="A picture file; or give --image.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A picture file, of any size.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("tokens.png"),
    model: Model = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    question: Annotated[str, typer.Option("--question", "-q", help="The prompt's question.")] = "Describe the image.",
    tower: Annotated[bool, typer.Option("--tower", help="Also draw what is left inside the vision tower.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Draw which patches every method keeps, merges (one colour for each token) and drops, stage by stage."""
    from vislm.errors import UsageError
    from vislm.report.tokens import token_figure

    if (picture is None) == (image is None):
        raise UsageError("give one picture: --image photo.jpg")
    if not prune:
        raise UsageError("nothing to draw: name a method, e.g. --prune flowcut:keep=16 (vislm list pruning)")
    chosen = picture or image
    assert chosen is not None
    lmm = load(model, dtype, device)
    rows = []
    for spec in prune:
        with lmm.using(*interventions([spec], heads)):
            answer = lmm.ask(chosen, question)
        rows.append((spec, answer, lmm.last_run))
    token_figure(chosen, rows, lmm.adapter, out, processor=lmm.processor, tower=tower)
    typer.echo(f"written to {out}")
