"""Drawing of the sixteen scene categories from ellipses, rectangles, polygons, arcs and lines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import ImageDraw

from vislm.errors import UnknownName

Colour = tuple[int, int, int]
Paint = Literal["fill", "background", "dark"]
_DARK: Colour = (15, 15, 15)


@dataclass(frozen=True)
class Part:
    """One primitive of a shape; coordinates in units of the object's radius, y downwards, origin at its centre."""

    kind: Literal["ellipse", "rectangle", "polygon", "arc", "line"]
    points: tuple[float, ...]
    paint: Paint = "fill"
    width: float = 0.0
    angles: tuple[float, float] = (0.0, 0.0)


def _e(*box: float, paint: Paint = "fill") -> Part:
    return Part("ellipse", box, paint)


def _r(*box: float, paint: Paint = "fill") -> Part:
    return Part("rectangle", box, paint)


def _p(*points: float) -> Part:
    return Part("polygon", points)


def _line(*points: float, width: float, paint: Paint = "fill") -> Part:
    return Part("line", points, paint, width)


def _arc(*box: float, angles: tuple[float, float], width: float) -> Part:
    return Part("arc", box, "fill", width, angles)


def _star() -> Part:
    corners = [(1.0 if k % 2 == 0 else 0.42, math.radians(36 * k - 90)) for k in range(10)]
    return _p(*(value for radius, angle in corners for value in (radius * math.cos(angle), radius * math.sin(angle))))


SHAPES: dict[str, tuple[Part, ...]] = {
    "star": (_star(),),
    "moon": (_e(-1, -1, 1, 1), _e(-0.4, -1.1, 1.4, 0.7, paint="background")),
    "cloud": (_e(-1, -0.2, 0, 0.6), _e(-0.5, -0.7, 0.5, 0.5), _e(0, -0.2, 1, 0.6)),
    "cup": (
        _p(-0.8, -0.7, 0.4, -0.7, 0.25, 0.8, -0.65, 0.8),
        _arc(0.1, -0.5, 1, 0.4, angles=(-90, 90), width=0.2),
    ),
    "fork": (
        _r(-0.12, -0.2, 0.12, 1),
        *(_r(left, -1, left + 0.16, -0.1) for left in (-0.45, -0.08, 0.3)),
        _r(-0.45, -0.25, 0.46, 0),
    ),
    "apple": (_e(-0.9, -0.5, 0.15, 0.95), _e(-0.15, -0.5, 0.9, 0.95), _line(0, -0.4, 0.25, -1, width=0.2)),
    "car": (
        _r(-1, -0.1, 1, 0.5),
        _p(-0.6, -0.1, -0.3, -0.6, 0.4, -0.6, 0.7, -0.1),
        _e(-0.75, 0.3, -0.25, 0.8, paint="dark"),
        _e(0.25, 0.3, 0.75, 0.8, paint="dark"),
    ),
    "house": (
        _r(-0.75, -0.1, 0.75, 0.95),
        _p(-1, -0.1, 0, -1, 1, -0.1),
        _r(-0.18, 0.35, 0.18, 0.95, paint="background"),
    ),
    "tree": (_r(-0.15, 0.3, 0.15, 1), _e(-0.75, -1, 0.75, 0.45)),
    "boat": (_p(-1, 0.35, 1, 0.35, 0.6, 0.9, -0.6, 0.9), _p(0, -1, 0, 0.2, 0.75, 0.2)),
    "fish": (_e(-1, -0.5, 0.5, 0.5), _p(0.3, 0, 1, -0.6, 1, 0.6)),
    "anchor": (
        _r(-0.1, -0.7, 0.1, 0.9),
        _arc(-0.8, -0.4, 0.8, 0.95, angles=(10, 170), width=0.25),
        _e(-0.25, -1, 0.25, -0.5),
        _r(-0.45, -0.4, 0.45, -0.2),
    ),
    "person": (_e(-0.35, -1, 0.35, -0.3), _p(-0.7, 0.9, -0.4, -0.25, 0.4, -0.25, 0.7, 0.9)),
    "dog": (
        _r(-0.8, -0.2, 0.6, 0.35),
        _r(-0.75, 0.3, -0.5, 0.9),
        _r(0.3, 0.3, 0.55, 0.9),
        _e(0.35, -0.75, 1, 0.05),
        _p(-0.8, -0.1, -1, -0.7, -0.6, -0.2),
    ),
    "bird": (
        _p(0, 0.35, -1, -0.6, -0.45, 0),
        _p(0, 0.35, 1, -0.6, 0.45, 0),
        _e(-0.3, -0.1, 0.3, 0.7),
    ),
    "ball": (
        _e(-0.9, -0.9, 0.9, 0.9),
        _line(-0.9, 0, 0.9, 0, width=0.2, paint="background"),
        _line(0, -0.9, 0, 0.9, width=0.2, paint="background"),
    ),
}
"""Category name -> its parts in drawing order."""


def blend(colour: Colour, background: Colour, contrast: float) -> Colour:
    """Return ``contrast * colour + (1 - contrast) * background`` per channel, rounded to integers."""
    red, green, blue = (
        round(contrast * front + (1 - contrast) * back) for front, back in zip(colour, background, strict=True)
    )
    return red, green, blue


def draw_shape(
    draw: ImageDraw.ImageDraw,
    category: str,
    centre: tuple[float, float],
    radius: float,
    colour: Colour,
    background: Colour,
    contrast: float = 1.0,
) -> None:
    """Draw one object.

    Args:
        draw: target; all lengths are pixels of this canvas.
        category: a key of :data:`SHAPES`.
        centre: x and y of the object's centre.
        radius: half the side of the object's box.
        colour: fill colour at full contrast.
        background: colour of holes (crescent, door, seams) and what faint objects fade into.
        contrast: 1 draws the colour itself, smaller values a blend with the background.

    Raises:
        UnknownName: for a category without a shape.
    """
    if category not in SHAPES:
        raise UnknownName("scene category", category, SHAPES)
    paints: dict[Paint, Colour] = {
        "fill": blend(colour, background, contrast),
        "dark": blend(_DARK, background, contrast),
        "background": background,
    }
    for part in SHAPES[category]:
        x, y = centre
        points = [(y if k % 2 else x) + radius * value for k, value in enumerate(part.points)]
        paint, width = paints[part.paint], max(1, round(part.width * radius))
        if part.kind == "ellipse":
            draw.ellipse(points, fill=paint)
        elif part.kind == "rectangle":
            draw.rectangle(points, fill=paint)
        elif part.kind == "polygon":
            draw.polygon(points, fill=paint)
        elif part.kind == "line":
            draw.line(points, fill=paint, width=width)
        else:
            draw.arc(points, *part.angles, fill=paint, width=width)
