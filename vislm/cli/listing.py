"""``vislm list`` and ``vislm info``."""

from __future__ import annotations

from typing import Annotated

import typer


def list_names(
    kind: Annotated[
        str, typer.Argument(help="models, families, pruning, heads, benchmarks or backends; nothing lists all.")
    ] = "all",
) -> None:
    """List what the package offers."""
    from vislm.catalog import SECTIONS
    from vislm.errors import UnknownName

    if kind != "all" and kind not in SECTIONS:
        raise UnknownName("kind", kind, [*SECTIONS, "all"])
    for name in SECTIONS if kind == "all" else [kind]:
        if kind == "all":
            typer.echo(f"{name}:")
        for entry, text in SECTIONS[name]():
            typer.echo(f"  {entry:<12} {text}".rstrip() if text else f"  {entry}")


def info(name: Annotated[str, typer.Argument(help="A method, or a model: embedded, folder or hub name.")]) -> None:
    """Show a method's options, or a model's sizes and costs."""
    from vislm.catalog import describe

    for line in describe(name):
        typer.echo(line)
