"""From a picture and a model to a sheet of panels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from vislm.errors import UsageError
from vislm.images import load_image
from vislm.report.attention_views.capture import at_layer, find_layer
from vislm.report.attention_views.drawing import Sheet, draw_sheet
from vislm.report.attention_views.loading import Backbone
from vislm.report.attention_views.panel import Layer, Panel
from vislm.report.attention_views.views import attention_name, panels_of

CENTRE = "50%,50%"


def attention_figure(
    backbone: Backbone,
    image: Path | Image.Image,
    out: Path,
    *,
    stage: int | None = None,
    block: int | None = None,
    queries: Sequence[str] = (CENTRE,),
    heads: Sequence[int] = (),
) -> Path:
    """Draw what patches attend to at a layer, a row of panels for each; write a PNG and return its path.

    The picture is scaled to cover what the model sees and cut to it around its centre; that part is shown.

    Args:
        backbone: see :func:`vislm.report.attention_views.loading.load_backbone`.
        image: a picture of any size.
        out: PNG file to write.
        stage: see :func:`vislm.report.attention_views.find_layer`.
        block: likewise.
        queries: patches of the layer's grid: ``"4,7"`` (row and column from 0) or ``"30%,55%"`` of height and width.
        heads: which heads, counted from 0; none = their mean and whatever else tells most.

    Raises:
        UsageError: a layer, patch or head that there is not, an attention without a picture.
        ImageError: a picture that cannot be read.
    """
    if not queries:
        raise UsageError("no query to draw; give at least one, such as 4,7 or 50%,50%")
    picture = load_image(image)
    height, width = backbone.sides((picture.height, picture.width))
    seen = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    site = find_layer(backbone.model, stage, block)

    def look(layer: Layer) -> tuple[str, tuple[int, int], list[tuple[tuple[int, int], list[Panel]]]]:
        places = [query_place(query, layer.grid) for query in queries]
        return attention_name(layer), layer.grid, [(place, panels_of(layer, place, heads)) for place in places]

    pixels = torch.from_numpy(np.asarray(seen, dtype=np.float32).copy())
    name, grid, rows = at_layer(backbone.model, backbone.normalized(pixels), site, look)
    title = f"{backbone.name}: {name.replace('_', '-')} attention{'' if backbone.trained else ' (untrained)'}"
    places = " and ".join(f"{row},{column}" for (row, column), _ in rows)
    many = "queries" if len(rows) > 1 else "query"
    subtitle = f"{site.path}, {grid[0]} x {grid[1]} patches, {many} {places}"
    if not backbone.trained:
        subtitle += "; random weights"
    return draw_sheet(Sheet(title, subtitle, seen, grid, rows), out)


def query_place(query: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of a patch from ``"4,7"`` or ``"30%,55%"`` of height and width.

    Raises:
        UsageError: no such text, a patch outside the grid.
    """
    number = r"\s*(\d+(?:\.\d+)?)%\s*"
    percent, plain = re.fullmatch(f"{number},{number}", query), re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", query)
    if percent is not None and all(float(part) <= 100 for part in percent.groups()):
        row, column = (
            min(int(float(part) / 100 * side), side - 1) for part, side in zip(percent.groups(), grid, strict=True)
        )
        return row, column
    if plain is None:
        raise UsageError(f"query {query!r}, expected row and column of a patch, such as 4,7, or 30%,55% of the picture")
    row, column = map(int, plain.groups())
    if row >= grid[0] or column >= grid[1]:
        raise UsageError(
            f"query {query} is outside of the grid of {grid[0]} x {grid[1]} patches; rows count from 0 to "
            f"{grid[0] - 1}, columns from 0 to {grid[1] - 1}"
        )
    return row, column
