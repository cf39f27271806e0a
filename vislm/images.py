"""One guarded function through which every image enters the package."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vislm.errors import ImageError

MAX_PIXELS = 64_000_000
"""Default limit on width x height; a 20 KB file can declare gigapixels."""
MAX_SIDE = 32_768

_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def load_image(source: str | os.PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return ``source`` as an upright RGB ``PIL.Image`` or raise :class:`ImageError` naming the file and the reason.

    The size is checked before any pixel is decoded; truncated files are refused (Pillow's global switches are never
    touched); the EXIF orientation is applied; transparent pixels are composited on white; 16-bit grey is scaled to
    8 bits; of an animation the first frame is taken.

    Args:
        source: a path, encoded bytes, or an image that is already open.
        max_pixels: refuse images with more pixels than this.
    """
    name = "<image>" if isinstance(source, Image.Image) else "<bytes>" if isinstance(source, bytes) else source
    if isinstance(source, (str, os.PathLike)) and not Path(source).is_file():
        raise ImageError(name, "no such file" if not Path(source).exists() else "not a file")
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore", UserWarning)  # odd metadata is common; whether it decodes is what counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = source
            else:
                opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
                image = stack.enter_context(opened)
            width, height = image.size
            if width * height > max_pixels or max(width, height) > MAX_SIDE:
                raise ImageError(
                    name,
                    f"{width} x {height} pixels exceed the limit of {max_pixels:,} pixels and {MAX_SIDE:,} a side; "
                    "resize it or pass a larger max_pixels",
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, "not an image in a known format") from None
    except _DECODE_ERRORS as error:
        raise ImageError(name, f"cannot be decoded ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image).astype(np.float32)
        values = values / 257.0 if values.max(initial=0.0) > 255 else values  # 16-bit grey: 65535 -> 255
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
