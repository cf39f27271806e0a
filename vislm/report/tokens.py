"""Pictures of the visual tokens that are left after each stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vislm.errors import UsageError
from vislm.images import load_image
from vislm.lmm.adapters import Adapter
from vislm.lmm.adapters.llava import Grid
from vislm.lmm.model import ImageSource
from vislm.lmm.run import Run
from vislm.report.overlay import kept_map, kept_overlay, seen_picture
from vislm.report.panels import Panel, panel_figure

_PER_ROW = 4


def token_figure(
    image: ImageSource,
    rows: Sequence[tuple[str, str, Run]],
    adapter: Adapter,
    out: Path,
    *,
    processor: Any | None = None,
    number: int = 0,
) -> Path:
    """Draw one panel per stage (and per grid of a tiled model) and one row per method; write a PNG, return its path.

    Methods with a single panel each stand side by side.

    Args:
        image: the picture that the runs are about.
        rows: per method (label, answer, run).
        adapter: the model's adapter, which knows where a token lies in the picture.
        out: PNG file to write.
        processor: the model's processor; says whether the tower sees the whole picture or its centre.
        number: which image of the runs to draw.

    Raises:
        UsageError: no rows, or a run without that image.
    """
    picture = load_image(image)
    panels = [
        token_panels(picture, label, answer, run, adapter, processor=processor, number=number)
        for label, answer, run in rows
    ]
    if all(len(row) == 1 for row in panels):  # one picture per method: side by side
        single = [row[0] for row in panels]
        panels = [single[i : i + _PER_ROW] for i in range(0, len(single), _PER_ROW)]
    return panel_figure(panels, Path(out))


def token_panels(
    image: Image.Image,
    label: str,
    answer: str,
    run: Run,
    adapter: Adapter,
    *,
    processor: Any | None = None,
    number: int = 0,
) -> list[Panel]:
    """Return the panels of one run: per stage and grid, kept patches clear and dropped ones faded.

    A run that dropped nothing gives one panel per grid with every patch clear. Arguments as in :func:`token_figure`.
    """
    if not 0 <= number < len(run.visual_tokens):
        raise UsageError(f"image number {number}: the run of {label!r} saw {len(run.visual_tokens)} images")
    stages = [(_stage_name(stage.where), stage.index[number]) for stage in run.stages]
    stages = stages or [("nothing dropped", list(range(run.visual_tokens[number])))]
    grids = image_grids(run, adapter, number)
    seen = seen_picture(image, adapter, processor)
    panels = []
    for name, kept in stages:
        for place, grid in enumerate(grids):
            view = "" if len(grids) == 1 else ("base view: " if place == 0 else "tiles: ")
            alive = int(kept_map(grid, kept).sum())
            subtitle = f"{view}{alive} of {grid.height * grid.width} tokens, {name}"
            panels.append(Panel(kept_overlay(seen, grid, kept), label, subtitle, answer))
    return panels


def image_grids(run: Run, adapter: Adapter, number: int = 0) -> list[Grid]:
    """Return where the tokens of an image of the run lie.

    A run that pruned only inside the language model kept no features to tell a tiled image's layout from: then the
    grid of the base view is all that is certain.
    """
    if run.features is not None:
        return adapter.grids(run.features[number])
    rows, columns = adapter.patch_grid
    return [Grid(rows, columns, start=0, row_stride=columns)]


def _stage_name(where: str) -> str:
    return "all layers" if where == "prompt" else f"{where} on"
