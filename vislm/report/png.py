"""Writing pictures: one PNG file per figure, complete or not there at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from vislm.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

INK = "#1f2933"
"""Text colour of all figures."""
QUIET = "#66727f"
"""Colour of secondary text and axes."""
ACCENT = "#e4572e"
"""Colour that marks what a method keeps or changes."""
GOOD, BAD = "#1a7f4b", "#c0322b"
"""Colours of right and wrong answers."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty matplotlib figure of that size in inches, drawn by Agg; no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Return text that matplotlib draws as it is: without this a model's dollar signs would start a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, out: Path, dpi: int = 110) -> Path:
    """Write a figure as PNG at ``dpi`` pixels per inch and return its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return _write(buffer, out)


def save_picture(picture: Image.Image, out: Path) -> Path:
    """Write a picture as PNG and return its path."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return _write(buffer, out)


def _write(buffer: io.BytesIO, out: Path) -> Path:
    with atomic_write(out, "wb") as handle:
        handle.write(buffer.getvalue())
    return out
