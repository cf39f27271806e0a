"""``vislm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page, the pictures and results.json.")
    ] = Path("out/demo"),
    scenes: Annotated[int, typer.Option("--scenes", min=1, help="Held-out scenes for POPE and CHAIR.")] = 40,
) -> None:
    """Do the main job once: ask, prune, reweight, measure, draw; open index.html in the folder afterwards."""
    from vislm.demo import run_demo

    run_demo(out, scenes=scenes, report=typer.echo)
