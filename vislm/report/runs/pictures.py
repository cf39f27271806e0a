"""The pictures of finished samples: found below the folders that the user names, nowhere else, and made small.

Names come from rows, that is from files that anyone may have written: a name that leads out of the folders, by dots, a
drive, or a link, is not opened.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vislm.errors import ImageError, UsageError, VislmError
from vislm.eval.coco import is_safe_name
from vislm.eval.protocol import Picture, Stored
from vislm.eval.specs import benchmark_names, open_benchmark
from vislm.images import load_image

SIDE = 240
"""Pixels of a thumbnail's longer side."""
_QUALITY = 82
_USUAL = ("", "images")
"""Folders below --data that are tried first."""


@dataclass(frozen=True)
class DataFolder:
    """One --data: a folder, and how a benchmark is read from it."""

    folder: Path
    spec: str = ""
    """BENCHMARK[:OPTION=VALUE,...], or empty: any benchmark, with its defaults."""

    @classmethod
    def parse(cls, text: str) -> DataFolder:
        """Read ``[BENCHMARK[:OPTION=VALUE,...]=]FOLDER``.

        Raises:
            UsageError: there is no such folder.
        """
        name = text.partition("=")[0].partition(":")[0]
        spec, equals, folder = text.rpartition("=")
        found = cls(Path(folder), spec) if equals and name in benchmark_names() else cls(Path(text))
        if not found.folder.is_dir():
            raise UsageError(f"--data {text}: {found.folder} is not a folder")
        return found


@dataclass
class PictureFinder:
    """Finds the pictures of one benchmark's rows."""

    benchmark: str
    data: Sequence[DataFolder]
    notes: dict[str, None] = field(default_factory=dict)
    """What went wrong, each text once."""

    def find(self, row: Mapping[str, Any]) -> list[Image.Image | None]:
        """Return the pictures of a row, decoded; None for each that is not there, not allowed or broken."""
        names = row.get("images")
        if not self.data or not isinstance(names, list):
            return []
        known = self._by_sample.get(str(row.get("id")), ())
        if [picture.name for picture in known] != names:
            known = [self._by_name(name) for name in names if isinstance(name, str)]
        return [self._open(picture) for picture in known]

    def _open(self, picture: Picture | None) -> Image.Image | None:
        if picture is None:
            return None
        if isinstance(picture, Path) and not self._inside(picture):
            self.notes["Some pictures lie outside --data, behind a link; name their own folder with --data too."] = None
            return None
        try:
            return load_image(picture.data, name=picture.name) if isinstance(picture, Stored) else load_image(picture)
        except ImageError as error:
            self.notes[f"Not shown: {error}"] = None
            return None

    def _inside(self, path: Path) -> bool:
        """Return whether a path, all links followed, lies in one of the folders."""
        try:
            resolved = path.resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
            return False
        return any(resolved.is_relative_to(root) for root in self._roots)

    @cached_property
    def _roots(self) -> list[Path]:
        return [data.folder.resolve() for data in self.data]

    @cached_property
    def _by_sample(self) -> dict[str, tuple[Picture, ...]]:
        """Sample id -> pictures, as the benchmark's own reader finds them; empty if the folder is no such data set."""
        found: dict[str, tuple[Picture, ...]] = {}
        if self.benchmark not in benchmark_names():
            return found
        for data in self.data:
            if data.spec and data.spec.partition(":")[0] != self.benchmark:
                continue
            try:
                samples = open_benchmark(data.spec or self.benchmark, data.folder).samples
            except VislmError:
                continue  # a folder of pictures without annotations will do
            for sample in samples:
                found.setdefault(sample.id, sample.images)
        return found

    def _by_name(self, name: str) -> Path | None:
        """Return a picture of that name: where it says, in images/, or the only one of that name further below."""
        if not is_safe_name(name):
            self.notes["Some rows name pictures outside --data; they are not opened."] = None
            return None
        for root in self._roots:
            for folder in _USUAL:
                path = root / folder / name
                if len(name) < _LONGEST and path.is_file():
                    return path
        found = self._files.get(Path(name).name, [])
        if len(found) > 1:
            self.notes["Some names belong to several pictures; name the folder with --data BENCHMARK=FOLDER."] = None
        return found[0] if len(found) == 1 else None

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in _walk(self._roots):
            found.setdefault(path.name, []).append(path)
        return found


_LONGEST = 1000
_MOST_FILES = 3_000_000


def _walk(roots: Iterable[Path]) -> Iterable[Path]:
    count = 0
    for root in roots:
        for folder, _, names in os.walk(root, followlinks=False):
            for name in names:
                count += 1
                if count > _MOST_FILES:
                    return
                yield Path(folder, name)


def thumbnail(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """Return a copy whose longer side has at most ``side`` pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def jpeg_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI; nothing but pixels of the original gets into it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def png_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI, without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
