"""Pictures whose pixels are classes: read as they are stored, never as colours."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vislm.errors import ImageError
from vislm.images import MAX_PIXELS, MAX_SIDE, pillow_warnings

_MODES = ("1", "L", "P", "I", "I;16")
_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, OverflowError, MemoryError)


def read_map(source: Path | bytes, name: str = "") -> NDArray[np.int64]:
    """Return the classes (H, W) that a PNG file of one channel holds; of a palette, its indices.

    Raises:
        ImageError: no PNG, too large, damaged, or a picture with colours.
    """
    name = name or (str(source) if isinstance(source, Path) else "<bytes>")
    try:
        with (
            pillow_warnings(),
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, "r", ("PNG",)) as file,
        ):
            if file.mode not in _MODES:
                raise ImageError(name, f"its mode is {file.mode}; a map of classes has one channel")
            if file.width * file.height > MAX_PIXELS or max(file.size) > MAX_SIDE:
                raise ImageError(name, f"{file.width} x {file.height} pixels exceed the limit of {MAX_PIXELS:,}")
            return np.asarray(file).astype(np.int64)
    except (*_ERRORS, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(name, f"is no map of classes as PNG ({error})") from error


def packed_map(classes: NDArray[np.integer]) -> str:
    """Return classes 0 to 255 (H, W) as base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(classes.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def unpacked_map(text: object, name: str) -> NDArray[np.int64]:
    """Return the classes (H, W) of :func:`packed_map`.

    Raises:
        ImageError: something else.
    """
    if not isinstance(text, str):
        raise ImageError(name, "has no map of classes as base64 of a PNG file")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageError(name, f"its map of classes is no base64 ({error})") from error
    return read_map(data, name)


def picture_size(path: Path) -> tuple[int, int] | None:
    """Return width and height from a picture's header, None if there is no such picture."""
    try:
        with pillow_warnings(), Image.open(path) as file:
            return file.size
    except (*_ERRORS, RuntimeError, Image.DecompressionBombError):
        return None
