"""The one function that decodes images."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from vislm.errors import ImageError
from vislm.images import decode, load_image, pillow_warnings


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


def test_icons_are_measured_by_what_they_hold() -> None:
    held = bomb(9_000, 9_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(held), 22)
    with pytest.raises(ImageError, match=r"icon\.ico: 9000 x 9000 pixels exceed"):
        load_image(struct.pack("<HHH", 0, 1, 1) + entry + held, name="icon.ico")
    assert load_image(encode(Image.new("RGBA", (32, 32), "red"), "ICO", sizes=[(32, 32)])).size == (32, 32)
    assert load_image(encode(Image.new("RGB", (32, 32)), "ICO", sizes=[(32, 32)], bitmap_format="bmp")).size == (32, 32)


def test_texts_in_a_png_are_counted(tmp_path) -> None:
    info = PngInfo()
    for number in range(24):
        info.add_text(f"k{number}", "text " * 100, zip=True)
    picture = Image.new("RGB", (4, 4))
    assert load_image(encode(picture, "PNG", pnginfo=info)).size == (4, 4)
    info.add_text("one", "more", zip=True)
    (tmp_path / "texts.png").write_bytes(encode(picture, "PNG", pnginfo=info))
    with pytest.raises(ImageError, match=r"texts\.png: holds more than 24 compressed texts"):
        load_image(tmp_path / "texts.png")


def test_dark_pictures_of_16_bits_stay_dark() -> None:
    assert load_image(encode(Image.new("I;16", (4, 4), 200), "PNG")).getpixel((0, 0)) == (1, 1, 1)
    assert load_image(Image.new("I", (4, 4), 200)).getpixel((0, 0)) == (200, 200, 200)
    assert load_image(Image.new("F", (4, 4), float("nan"))).getpixel((0, 0)) == (0, 0, 0)


def test_palettes_with_transparency_lie_on_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for options in ({"transparency": 1}, {"transparency": bytes([255, 0])}):
        shown = load_image(encode(picture, "PNG", **options))
        assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_formats_that_run_or_fetch_something_are_unknown() -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(ImageError, match="not an image in a known format"):
            load_image(data)


def test_a_larger_limit_is_honoured() -> None:
    data = encode(Image.new("1", (9_000, 8_000)), "PNG")
    with pytest.raises(ImageError, match="exceed the limit of 64,000,000"):
        load_image(data)
    assert load_image(data, max_pixels=80_000_000).size == (9_000, 8_000)


def test_warnings_of_the_process_stay_as_they_are(tmp_path) -> None:
    before = list(warnings.filters)
    with pillow_warnings(), ThreadPoolExecutor(4) as pool:
        data = encode(Image.new("RGB", (64, 64)), "JPEG")
        assert all(picture.size == (64, 64) for picture in pool.map(decode, [data] * 50))
    assert warnings.filters == before


def test_folders_are_not_images(tmp_path) -> None:
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path)
