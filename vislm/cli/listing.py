"""``vislm list`` and ``vislm info``."""

from __future__ import annotations

from typing import Annotated

import typer

from vislm.cli._options import Device


def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="models, families, backbones, attentions, pruning, heads, benchmarks or backends; nothing lists all."
        ),
    ] = "all",
    families: Annotated[
        bool, typer.Option("--families", help="Show which method runs on which model family, and why not where not.")
    ] = False,
) -> None:
    """List what the package offers."""
    from vislm.catalog import SECTIONS
    from vislm.errors import UnknownName
    from vislm.eval.running.subjects import MODEL_FORMS

    if families:
        from vislm.support import support_lines

        for line in support_lines():
            typer.echo(line)
        return

    if kind != "all" and kind not in SECTIONS:
        raise UnknownName("kind", kind, [*SECTIONS, "all"])
    for name in SECTIONS if kind == "all" else [kind]:
        if kind == "all":
            typer.echo(f"{name}:")
        entries = [*SECTIONS[name](), *(MODEL_FORMS.items() if name == "models" else ())]
        width = max(12, *(len(entry) for entry, _ in entries))
        for entry, text in entries:
            typer.echo(f"  {entry:<{width}} {text}".rstrip() if text else f"  {entry}")


def info(
    name: Annotated[str, typer.Argument(help="A method, a backbone, or a model: embedded, folder or hub name.")],
    size: Annotated[
        str | None,
        typer.Option(help="Image that a backbone is measured with, such as 448 or 800x1333; default: as published."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Show a method's options, or a model's sizes and costs; a backbone's time, memory and field are measured."""
    from vislm.catalog import describe
    from vislm.cli._sizes import parse_sizes

    sides = None if size is None else parse_sizes("--size", size, axes=2)
    for line in describe(name, None if sides is None else (sides[0], sides[1]), device):
        typer.echo(line)
