"""``vislm visualize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Image, Model, Prune, interventions, load

app = typer.Typer(help="Draw what a method does.", no_args_is_help=True)

Question = Annotated[str, typer.Option("--question", "-q", help="The prompt's question.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")]


@app.callback()
def _visualize() -> None:
    """Draw what a method does."""


@app.command()
def tokens(
    image: Image,
    out: Out = Path("tokens.png"),
    model: Model = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    question: Question = "Describe the image.",
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Draw the visual tokens that are left after each stage of every pruning method over the picture."""
    from vislm.errors import UsageError
    from vislm.report.tokens import token_figure

    if not prune:
        raise UsageError("nothing to draw: name a method, e.g. --prune flowcut:keep=16 (vislm list pruning)")
    lmm = load(model, dtype, device)
    rows = []
    for spec in prune:
        with lmm.using(*interventions([spec], heads)):
            answer = lmm.ask(image, question)
        rows.append((spec, answer, lmm.last_run))
    token_figure(image, rows, lmm.adapter, out, processor=lmm.processor)
    typer.echo(f"written to {out}")


@app.command()
def heads(
    image: Image,
    out: Out = Path("heads.png"),
    model: Model = "vislm-tiny",
    method: Annotated[str, typer.Option("--heads", help="A head method, e.g. vhr:alpha=2.")] = "vhr",
    question: Question = "Describe the image.",
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Draw the factor of every head, layer by layer, and the divergence it was chosen by."""
    from vislm.report.heads import head_figure

    lmm = load(model, dtype, device)
    with lmm.using(*interventions(None, [method])):
        lmm.ask(image, question)
    assert lmm.last_run is not None
    head_figure(lmm.last_run, lmm.model.config.text_config, out, title=method)
    typer.echo(f"written to {out}")


@app.command()
def patterns(out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")]) -> None:
    """Draw every attention pattern from its mask: what one query sees, and the whole mask."""
    from vislm.report.patterns import draw_gallery

    for path in draw_gallery(out):
        typer.echo(f"written to {path}")
