"""``vislm carve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Image, Model, Prune, interventions, load


def carve(
    image: Image,
    question: Annotated[str, typer.Argument(help="What you want to know about it.")],
    options: Annotated[
        str, typer.Option("--options", metavar="OPTION=VALUE,...", help="e.g. version=v1,top_percent=0.3.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for refined.png and mask.png: what was asked about.")
    ] = None,
    model: Model = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Ask about the part of a picture that the question looks at and a general instruction does not (CARVE)."""
    import dataclasses

    from PIL import Image as Pictures

    from vislm import registry
    from vislm.files import atomic_write
    from vislm.heads import carve as method

    chosen = registry.build("heads", f"carve:{options}")
    methods = interventions(prune, heads)
    lmm = load(model, dtype, device)
    with lmm.using(*methods):
        result = method.carve(lmm, image, question, **dataclasses.asdict(chosen))  # pyright: ignore[reportArgumentType]
    typer.echo(result.answer)
    typer.echo(f"to the whole picture: {result.first_answer}; asked again about {result.box}", err=True)
    if out is not None:
        for name, picture in (("refined", result.refined), ("mask", Pictures.fromarray(result.mask))):
            with atomic_write(out / f"{name}.png", "wb") as file:
                picture.save(file, format="PNG")
        typer.echo(f"written to {out}", err=True)
