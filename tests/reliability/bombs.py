"""Small files that unpack to gigabytes: refused before they do.

Each is opened by a process of its own, which reports how far its peak memory rose.

    python bombs.py
"""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable

from outcome import Outcome, Stopwatch, in_own_process
from PIL import Image

from vislm.errors import ImageError
from vislm.images import load_image

MEMORY, SECONDS = 50.0, 1.0
"""MB above what the process held before; time to refuse."""


def trial() -> Outcome:
    """Open every bomb."""
    watch = Stopwatch()
    found = in_own_process("bombs.py")
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("decompression bombs", found.pop("cases", 0), found, watch.seconds, failures)


def main() -> dict:
    bombs = _bombs()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO"):  # so that no bomb pays for loading the decoders
        load_image(_encoded(kind))
    measured = {name: _measured(data) for name, data in bombs.items()}
    failures = []
    for name, (megabytes, seconds, verdict) in measured.items():
        fine = verdict == "refused" or (name.startswith("gif of a million") and verdict == "first frame")
        if not fine or megabytes > MEMORY or seconds > SECONDS:
            failures.append(f"{name}: {verdict}, {megabytes:.1f} MB, {seconds:.2f} s")
    return {
        "cases": len(bombs),
        "most memory, MB": round(max(m for m, _, _ in measured.values()), 1),
        "slowest, seconds": round(max(s for _, s, _ in measured.values()), 3),
        "accepted, above 50 MB or 1 s": len(failures),
        "failures": failures,
    }


def _measured(data: bytes) -> tuple[float, float, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before, began, verdict = _peak(), time.perf_counter(), "accepted"
        try:
            if load_image(data).size == (1, 1):
                verdict = "first frame"
        except ImageError:
            verdict = "refused"
        report = ((_peak() - before) / 1e3, time.perf_counter() - began, verdict)
        os.write(writing, json.dumps(report).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(report)) if report else (0.0, 0.0, "crashed")


def _peak() -> int:
    """Return the most kB that this process has held in memory."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def _bombs() -> dict[str, bytes]:
    black = _black_png(13_000, 13_000)
    text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000))
    huge: dict[str, Callable[[int, int], bytes]] = {"gif": _gif, "tiff": _tiff, "bmp": _bmp, "jpeg": _jpeg}
    return {
        "png of 169 megapixels in 160 KB": black,
        "png that declares 1.6 gigapixels": _png(40_000, 40_000),
        "png that declares 2^31 - 1 a side": _png(2**31 - 1, 2**31 - 1),
        "png of one row of 40,000": _png(40_000, 1),
        "png with 60 MB of text": _png(8, 8, text * 60),
        "png with 600 MB of text": _png(8, 8, text * 600),
        "png with 60 MB of text behind the pixels": _png(8, 8)[:-12] + text * 60 + _chunk(b"IEND", b""),
        "icon of 16 x 16 that holds 169 megapixels": _icon(black),
        "icon of 16 x 16 that holds 79 megapixels": _icon(_black_png(8_900, 8_900)),
        "webp canvas of 268 megapixels": _webp(16_383, 16_383),
        "ppm that declares 1.6 gigapixels": b"P6 40000 40000 255\n" + b"\0" * 99,
        "gif of a million frames": _gif(1, 1, 1_000_000),
        **{f"{name} that declares 1.6 gigapixels": make(40_000, 40_000) for name, make in huge.items()},
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, extra: bytes = b"", pixels: bytes | None = None) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(b"\0" * 4096) if pixels is None else pixels)
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + _chunk(b"IEND", b"")


def _black_png(width: int, height: int) -> bytes:
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height))
    return _png(width, height, pixels=rows + packer.flush())


def _icon(picture: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + picture


def _gif(width: int, height: int, frames: int = 1) -> bytes:
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    place = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return start + (b"\x21\xf9\x04\0\x01\0\0\0" + place + b"\x02\x02\x44\x01\x00") * frames + b";"


def _webp(width: int, height: int) -> bytes:
    canvas = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = b"\0" * 6 + (15).to_bytes(3, "little") * 2 + b"\0" * 4 + _encoded("WEBP")[12:]
    chunks = ((b"VP8X", canvas), (b"ANIM", b"\0" * 6), (b"ANMF", frame))
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(width: int, height: int) -> bytes:
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, 99))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(300, b"\0")


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + header + b"\0" * 46


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(_encoded("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    return buffer.getvalue()


if __name__ == "__main__":
    print(json.dumps(main()))
