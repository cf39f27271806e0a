"""The one place where image files are decoded; every picture enters through it."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from vislm.errors import ImageError

MAX_PIXELS = 64_000_000
"""Default limit on width x height; a 20 KB file can declare gigapixels."""
MAX_SIDE = 32_768
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "ICO", "AVIF", "JPEG2000")
"""What is decoded; others are refused unread (EPS, for one, would start an interpreter)."""

_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    MemoryError,
    OverflowError,
    RuntimeError,  # libavif's faults
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_MAX_TEXTS = 24


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Return ``source`` as an upright RGB ``PIL.Image`` or raise :class:`ImageError` naming the file and the reason.

    The size is checked before any pixel is decoded; truncated files are refused (Pillow's global switches are never
    touched); the EXIF orientation is applied; transparent pixels are composited on white; 16-bit grey is scaled to
    8 bits; of an animation the first frame is taken.

    Args:
        source: a path, encoded bytes, or an image that is already open.
        max_pixels: refuse images with more pixels than this.
        name: what to call bytes and open images in messages.
    """
    with pillow_warnings():
        return decode(source, max_pixels=max_pixels, name=name)


@contextlib.contextmanager
def pillow_warnings() -> Iterator[None]:
    """Silence Pillow about odd metadata and sizes (there is a limit of our own), for :func:`decode` in threads.

    Python's warning filters belong to the process: enter this in the thread that starts the others, around them all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd metadata is common; whether it decodes is what counts
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
        yield


def decode(
    source: str | os.PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Do what :func:`load_image` does, inside :func:`pillow_warnings`."""
    if isinstance(source, Image.Image):
        name = name or "<image>"
    elif isinstance(source, bytes):
        name = name or "<bytes>"
    else:
        name = name or str(source)
        if not Path(source).is_file():
            raise ImageError(name, "no such file" if not Path(source).exists() else "not a file")
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
            else:
                image = stack.enter_context(_opened(source, max_pixels, name))
            _check_size(image.size, max_pixels, name)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, f"not an image in a known format ({', '.join(FORMATS)})") from None
    except _DECODE_ERRORS as error:
        raise ImageError(name, f"cannot be decoded ({error or type(error).__name__})") from error


def _opened(source: str | os.PathLike[str] | bytes, max_pixels: int, name: str) -> Image.Image:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        magic = file.read(8)
        if magic == b"\x89PNG\r\n\x1a\n":
            _check_texts(file, name)
        elif magic[:4] == b"\0\0\1\0":
            _check_icon(file, int.from_bytes(magic[4:6], "little"), max_pixels, name)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())


@cache
def _formats() -> list[str]:
    """Return those of ``FORMATS`` that the installed Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_texts(file: IO[bytes], name: str) -> None:
    """Refuse a PNG with many compressed texts: Pillow unpacks them, a megabyte each, before it knows the size."""
    texts = 0
    while len(header := file.read(8)) == 8:  # behind the pixels too
        texts += header[4:] in (b"zTXt", b"iTXt")
        if texts > _MAX_TEXTS:
            raise ImageError(name, f"holds more than {_MAX_TEXTS} compressed texts")
        file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)


def _check_icon(file: IO[bytes], entries: int, max_pixels: int, name: str) -> None:
    """Check the pictures inside an icon: they may be larger than it declares, and opening it decodes one."""
    for entry in range(entries):
        file.seek(6 + 16 * entry + 12)
        offset = file.read(4)
        if len(offset) < 4:
            return
        file.seek(int.from_bytes(offset, "little"))
        header = file.read(24)
        if header[:4] == b"\x89PNG":
            width, height = struct.unpack(">II", header[16:24].rjust(8, b"\0"))
            _check_size((width, height), max_pixels, name)
        elif len(header) >= 12:
            width, height = struct.unpack("<ii", header[4:12])
            _check_size((abs(width), abs(height) // 2), max_pixels, name)  # picture and mask, one above the other


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            name,
            f"{width} x {height} pixels exceed the limit of {max_pixels:,} pixels and {MAX_SIDE:,} a side; "
            "resize it or pass a larger max_pixels",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey values: 65535 is white in 16 bits; in wider modes, which name no white, only where 255 is exceeded."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    if image.mode.startswith("I;16") or values.max(initial=0.0) > 255:
        values = values / 257.0
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
