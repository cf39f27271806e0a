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
    stats: Annotated[
        bool, typer.Option("--stats", help="Also answer without pruning, a few times in turn, and compare the costs.")
    ] = False,
) -> None:
    """Ask a model about a picture, with pruned visual tokens and reweighted heads if you like."""
    methods = interventions(prune, heads)
    lmm = load(model, dtype, device)
    if stats:
        from vislm.lmm.cost.measuring import compare
        from vislm.report.run_table import run_lines

        others = interventions(None, heads)
        found = compare(lmm, image, question, interventions(prune, None), others, max_new_tokens=max_new_tokens)
        typer.echo("\n".join([found.answer, *run_lines(found.pruned, found.full)]))
        return
    with lmm.using(*methods):
        typer.echo(lmm.ask(image, question, max_new_tokens=max_new_tokens))
    if details and lmm.last_run:
        from vislm.report.run_table import run_lines

        for line in run_lines(lmm.last_run):
            typer.echo(line)
