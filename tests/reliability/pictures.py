"""Mutated pictures: the loader decodes them or raises its own error, and a run never puts another in their place.

python pictures.py CASES SEED
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mutations import mutated
from outcome import Outcome, Stopwatch, in_own_process
from PIL import Image

from vislm.errors import ImageError
from vislm.eval.protocol import Benchmark, Control, Sample, Verdict
from vislm.images import load_image

HANG = 1.0
"""Seconds."""


def trial(cases: int, seed: int) -> Outcome:
    """Decode ``cases`` mutated pictures, and run a benchmark over a sixth of them."""
    watch = Stopwatch()
    found = in_own_process("pictures.py", cases, seed)
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("mutated pictures, 10 formats", found.pop("cases", 0), found, watch.seconds, failures)


def seeds() -> dict[str, bytes]:
    """Return name -> a valid file; ten formats, some in two kinds."""
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (40, 33), rng.randbytes(40 * 33 * 3))
    clear = noise.copy()
    clear.putalpha(Image.radial_gradient("L").resize(noise.size))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    deep = Image.frombytes("I;16", (20, 20), rng.randbytes(800))
    turned = noise.rotate(90)
    return {
        "png": _encoded(clear, "PNG"),
        "png palette": _encoded(noise.quantize(16), "PNG", transparency=3),
        "png 16 bits": _encoded(deep, "PNG"),
        "jpeg exif": _encoded(noise, "JPEG", exif=exif),
        "jpeg cmyk progressive": _encoded(noise.convert("CMYK"), "JPEG", progressive=True),
        "webp animated": _encoded(noise, "WEBP", save_all=True, append_images=[turned]),
        "gif animated": _encoded(noise, "GIF", save_all=True, append_images=[turned]),
        "tiff": _encoded(noise, "TIFF"),
        "tiff lzw": _encoded(noise, "TIFF", compression="tiff_lzw"),
        "bmp": _encoded(noise, "BMP"),
        "ppm": _encoded(noise, "PPM"),
        "ico": _encoded(clear, "ICO", sizes=[(32, 32)]),
        "avif": _encoded(noise, "AVIF"),
        "jpeg2000": _encoded(noise, "JPEG2000"),
    }


def main(cases: int, seed: int) -> dict:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes what it thinks of the files
    files, failures, counts, slowest = seeds(), [], Counter(), 0.0
    for name, data in _cases(files, cases, seed):
        began = time.perf_counter()
        try:
            picture = load_image(data)
            counts["decoded"] += 1
            if picture.mode != "RGB":
                failures.append(f"{name}: mode {picture.mode}")
        except ImageError:
            counts["refused"] += 1
        except Exception as error:  # any other class is the finding
            failures.append(f"{name}: {type(error).__name__}: {error}")
        took = time.perf_counter() - began
        slowest = max(slowest, took)
        if took > HANG:
            failures.append(f"{name}: took {took:.1f} s")
    substitutions = _substitutions(list(_cases(files, cases // 6, seed + 1)))
    return {
        "cases": cases,
        **counts,
        "crashes, hangs, other exceptions": len(failures),
        "silent substitutions": len(substitutions),
        "slowest, seconds": round(slowest, 3),
        "failures": failures + substitutions,
    }


def _cases(files: dict[str, bytes], cases: int, seed: int) -> Iterator[tuple[str, bytes]]:
    names = list(files)
    for number in range(cases):
        name = names[number % len(names)]
        yield f"{name}, case {number} of seed {seed}", mutated(files[name], random.Random(f"{seed}/{number}"))


def _substitutions(cases: list[tuple[str, bytes]]) -> list[str]:
    """Run a benchmark over mutated files; every row must come from its own file, every other file must be listed."""
    from vislm.eval.running.runner import run

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, (_, data) in enumerate(cases):
            (folder / f"{number}.img").write_bytes(data)
        paths = tuple(folder / f"{number}.img" for number in range(len(cases)))
        results = run(_Pixels(paths), _Digests(), folder / "run", batch_size=16, on_error="skip")
        rows = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
        listed = {fault["id"] for fault in results["broken"]}
        wrong = [r["id"] for r in rows if r["text"] != _own(folder / r["id"])]
        lost = {p.name for p in paths} - listed - {r["id"] for r in rows}
        unnamed = [f["id"] for f in results["broken"] if f["id"] not in f["error"]]
    names = [*wrong, *lost, *unnamed]
    return [f"{cases[int(name.split('.')[0])][0]}: replaced, lost or not named" for name in names]


@dataclass(frozen=True)
class _Pixels(Benchmark):
    paths: tuple[Path, ...]
    control: Control = "none"
    name = "pixels"

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(p.name, (p,), "") for p in self.paths]

    @property
    def protocol(self) -> dict:
        return {}

    def parse(self, row) -> Verdict:
        return Verdict(row["text"], None)

    def aggregate(self, rows) -> dict:
        return {}


class _Digests:
    def fingerprint(self) -> dict:
        return {}

    def respond(self, batch, *, max_new_tokens) -> list[dict]:
        return [{"text": _digest(asked.images[0]), "seconds": 0.0} for asked in batch]


def _own(path: Path) -> str | None:
    try:
        return _digest(load_image(path))
    except ImageError:
        return None


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
