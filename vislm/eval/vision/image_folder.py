"""Pictures in one folder per class: ``root/<class>/<picture>``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vislm.errors import AnnotationError
from vislm.eval.reading import Fault

SUFFIXES = frozenset((".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2"))
_LITTER = frozenset(("Thumbs.db", "desktop.ini"))


@dataclass(frozen=True)
class Labelled:
    """A picture and the classes that are right."""

    id: str
    """Folder and file name."""
    path: Path
    labels: tuple[int, ...]


def read_folders(root: Path, index_of: Callable[[str], int], faults: list[str]) -> list[Labelled]:
    """Return the pictures of a folder of class folders, by class index, then by name.

    Args:
        root: the folder.
        index_of: class index of a folder's name; raises ``Fault`` for one that is no class.
        faults: grows by one line for each folder or file that does not belong there; pictures in it are left out.

    Raises:
        AnnotationError: no folder in ``root`` at all.
    """
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    if not folders:
        raise AnnotationError(f"{root} holds no class folders")
    known: list[tuple[int, Path]] = []
    for folder in folders:
        try:
            known.append((index_of(folder.name), folder))
        except Fault as fault:
            faults.append(f"{folder}: {fault}")
    pictures = [p for label, folder in sorted(known) for p in _pictures(folder, label, faults)]
    taken: dict[int, Path] = {}
    for label, folder in known:
        if taken.setdefault(label, folder) != folder:
            faults.append(f"{folder}: is of the same class as {taken[label].name}")
    return pictures


def _pictures(folder: Path, label: int, faults: list[str]) -> list[Labelled]:
    found: list[Labelled] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LITTER:
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.append(Labelled(f"{folder.name}/{path.name}", path, (label,)))
        else:
            faults.append(f"{path}: {'a folder' if path.is_dir() else 'no picture'} in a class folder")
    if not found:
        faults.append(f"{folder}: holds no pictures")
    return found
