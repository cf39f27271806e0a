"""``vislm visualize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli import visualize_tokens
from vislm.cli._options import Device, Dtype, Image, Model, interventions, load

app = typer.Typer(help="Draw what a method does.", no_args_is_help=True)

Question = Annotated[str, typer.Option("--question", "-q", help="The prompt's question.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")]


@app.callback()
def _visualize() -> None:
    """Draw what a method does."""


app.command()(visualize_tokens.tokens)


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


@app.command()
def attention(
    image: Annotated[Path, typer.Option("--image", "-i", help="A picture file, of any size.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH",
            help="A backbone (vislm list backbones), its YAML file, timm's name, or a folder of timm's.",
        ),
    ],
    out: Out = Path("attention.png"),
    stage: Annotated[int | None, typer.Option(help="Of the layer; negative from the end. Default: the first.")] = None,
    block: Annotated[int | None, typer.Option(help="Of that stage, or of a model without stages; likewise.")] = None,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", help="A patch: ROW,COL from 0, or 30%,55% of the picture. May be repeated."),
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option(help="Draw this head, from 0, and not the mean. May be repeated.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A safetensors file of the model's state dict.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's weights; may download them.")] = False,
    size: Annotated[
        str | None, typer.Option(help="Show the model the picture at 448 or 320x480 (height x width) pixels.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
) -> None:
    """Draw what patches attend to at a layer of a backbone: windows, agents, super tokens, heads, ..."""
    from vislm.cli._sizes import parse_sizes
    from vislm.report.attention_views.figure import CENTRE, attention_figure
    from vislm.report.attention_views.loading import load_backbone

    sides = None if size is None else parse_sizes("--size", size, axes=2)
    backbone = load_backbone(
        model,
        weights=weights,
        pretrained=pretrained,
        size=None if sides is None else (sides[0], sides[1]),
        seed=seed,
    )
    attention_figure(backbone, image, out, stage=stage, block=block, queries=query or (CENTRE,), heads=head or ())
    typer.echo(f"written to {out}")


@app.command()
def gallery(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for gallery.md and gallery/*.png, such as docs.")],
) -> None:
    """Draw the documentation's gallery: every attention, for one patch of one photograph."""
    from vislm.report.gallery import draw_gallery

    for path in draw_gallery(out):
        typer.echo(f"written to {path}")
