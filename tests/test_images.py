"""The one function that decodes images."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vislm.errors import ImageError
from vislm.images import load_image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4096))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(13_000, 13_000), (40_000, 40_000), (2**31 - 1, 2**31 - 1), (40_000, 1)])
def test_bombs_are_refused_cheaply(size) -> None:
    data = bomb(*size)
    tracemalloc.start()
    with pytest.raises(ImageError):
        load_image(data)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_the_limit_is_an_argument() -> None:
    with pytest.raises(ImageError, match=r"100 x 100 pixels exceed the limit of 9,999 pixels"):
        load_image(Image.new("RGB", (100, 100)), max_pixels=9_999)


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encode(image, "JPEG", exif=exif)).size == (20, 40)


def test_modes() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(encode(transparent, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.new("I;16", (4, 4), 65535)
    assert load_image(encode(deep, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    middle = load_image(encode(Image.new("I;16", (4, 4), 32896), "PNG")).getpixel((0, 0))
    assert middle == (128, 128, 128)
    for mode in ("1", "L", "P", "CMYK", "LA"):
        assert load_image(encode(Image.new(mode, (4, 4)), "TIFF" if mode in ("CMYK", "LA") else "PNG")).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert load_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_files_never_decode_to_half_a_picture(kind) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = encode(noise, kind)
    for keep in (len(data) // 4, len(data) // 2, len(data) - 200):
        with pytest.raises(ImageError):
            load_image(data[:keep])


@given(st.integers(0, 2**32 - 1), st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO"]))
def test_mutated_files_decode_or_raise_our_error(seed, kind) -> None:
    import random

    rng = random.Random(seed)
    data = bytearray(encode(Image.radial_gradient("L").resize((32, 32)).convert("RGB"), kind))
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        assert load_image(bytes(data)).mode == "RGB"
    except ImageError:
        pass


def test_global_switches_stay_as_they_are() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_folders_are_not_images(tmp_path) -> None:
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path)
