"""``vislm explain-prune``."""

from __future__ import annotations

from typing import Annotated

import typer

from vislm.cli._options import Prune, interventions


def explain_prune(
    prune: Prune = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|HUB|SHAPE",
            help="As elsewhere, or a published model whose sizes are known, such as llava-1.5-7b. No weights are read.",
        ),
    ] = "vislm-tiny",
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Columns beside the visual tokens.")] = 60,
    image_size: Annotated[str, typer.Option("--image-size", metavar="WxH", help="Of the picture.")] = "640x480",
    value_bytes: Annotated[int, typer.Option("--value-bytes", min=1, help="Of a number in the cache: 2 = 16 bit.")] = 2,
) -> None:
    """Say what pruning will cost and save, before anything runs: tokens per layer, FLOPs, bytes, limits.

    Several methods act together. Counts are exact unless a line says what an estimate assumes.
    """
    from vislm.cli._sizes import parse_sizes
    from vislm.lmm.cost.expectation import expect
    from vislm.lmm.prompt.image_layout import ImageLayout, blank_model
    from vislm.report.expectation import expectation_lines

    methods = interventions(prune, None)
    width, height = parse_sizes("--image-size", image_size, axes=2)
    adapter, processor = blank_model(model)
    layout = ImageLayout.of(adapter, processor, (width, height))
    full = expect(adapter, (), layout, text_tokens, value_bytes)
    pruned = expect(adapter, methods, layout, text_tokens, value_bytes)
    crops = "1 crop" if len(layout.crops) == 1 else f"{len(layout.crops)} crops"
    typer.echo(f"{model} ({adapter.family}), {', '.join(prune or ['untouched'])}")
    typer.echo(f"image {width} x {height}: {crops}, {layout.patches} patches, {layout.tokens} visual tokens")
    for line in expectation_lines(adapter, full, pruned):
        typer.echo(line)
