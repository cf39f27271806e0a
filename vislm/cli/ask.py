"""``vislm ask``."""

from __future__ import annotations

from typing import Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Image, MaxNewTokens, Model, Prune, interventions, load


def ask(
    image: Image,
    question: Annotated[str, typer.Argument(help="What you want to know about it.")],
    model: Model = "vislm-tiny",
    prune: Prune = None,
    heads: Heads = None,
    max_new_tokens: MaxNewTokens = 64,
    dtype: Dtype = None,
    device: Device = "cpu",
    details: Annotated[bool, typer.Option("--details", help="Also print what the run did.")] = False,
) -> None:
    """Ask a model about a picture, with pruned visual tokens and reweighted heads if you like."""
    methods = interventions(prune, heads)
    lmm = load(model, dtype, device)
    with lmm.using(*methods):
        typer.echo(lmm.ask(image, question, max_new_tokens=max_new_tokens))
    if details and lmm.last_run:
        from vislm.report.run_table import run_lines

        for line in run_lines(lmm.last_run):
            typer.echo(line)
