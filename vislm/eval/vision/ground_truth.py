"""The classes of ImageNet's validation pictures where these lie in one folder: four kinds of lists are in use.

LOC_val_solution.csv (Kaggle) and val.txt name each picture; imagenet_2012_validation_synset_labels.txt and the
development kit's ILSVRC2012_validation_ground_truth.txt are in the order of the pictures. The kit numbers the classes
in an order of its own, which only its meta.mat tells: read as positions in the sorted list they would all be wrong.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError
from vislm.eval.reading import Fault, find_file, read_text, shown

CSV, SYNSETS, LIST, KIT = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
_KIT_FOLDERS = ("", "data/", "ILSVRC2012_devkit_t12/data/")
FILES = (CSV, SYNSETS, LIST, *(f"{folder}{KIT}" for folder in _KIT_FOLDERS))


def read_ground_truth(root: Path, places: Mapping[str, int], faults: list[str]) -> tuple[dict[str, int], str]:
    """Return picture's name -> class index, and the name of the file that says so.

    Args:
        root: folder with one of ``FILES``.
        places: synset id -> class index.
        faults: grows by one line per bad line.

    Raises:
        AnnotationError: none of the files is there; the kit's without meta.mat, or scipy to read it.
    """
    file = find_file(root, FILES, "list of the classes of flat validation pictures")
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if file.name.startswith(CSV):
        rows: Iterable[tuple[str, str]] = _solution(lines)
        read = _wnid(places)
    elif file.name.startswith(LIST):
        rows = (tuple(line.split(maxsplit=1)) if " " in line.strip() else (line, "") for line in lines)  # pyright: ignore[reportAssignmentType]
        read = _wnid_or_index(places)
    else:
        rows = ((val_name(number), line.strip()) for number, line in enumerate(lines, start=1))
        read = _wnid(places) if file.name.startswith(SYNSETS) else _kit_number(file.parent, places)
    found: dict[str, int] = {}
    first = 2 if file.name.startswith(CSV) else 1
    for number, (name, value) in enumerate(rows, start=first):
        try:
            if name in found:
                raise Fault(f"{shown(name)} appears twice")
            found[name] = read(value)
        except Fault as fault:
            faults.append(f"{file.name}: line {number}: {fault}")
    return found, file.name


def val_name(number: int) -> str:
    """Return the file name of a validation picture by its number from 1."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def _solution(lines: list[str]) -> Iterable[tuple[str, str]]:
    """Yield name and synset id; a picture's boxes are all of its one class."""
    try:
        rows = list(csv.reader(lines))
    except csv.Error as error:
        raise AnnotationError(f"{CSV} is no table: {error}") from error
    for row in rows[1:]:
        yield f"{row[0]}.JPEG", row[1].split()[0] if len(row) > 1 and row[1].strip() else ""


def _wnid(places: Mapping[str, int]) -> Callable[[str], int]:
    def read(value: str) -> int:
        if value not in places:
            raise Fault(f"{shown(value)} is none of the {len(places)} synset ids")
        return places[value]

    return read


def _wnid_or_index(places: Mapping[str, int]) -> Callable[[str], int]:
    wnid = _wnid(places)

    def read(value: str) -> int:
        value = value.strip()
        if not value.isdecimal():
            return wnid(value)
        if len(value) > 4 or int(value) >= len(places):
            raise Fault(f"class {shown(value)}; expected 0 to {len(places) - 1}, or a synset id")
        return int(value)

    return read


def _kit_number(folder: Path, places: Mapping[str, int]) -> Callable[[str], int]:
    wnids = _kit_synsets(folder / "meta.mat")

    def read(value: str) -> int:
        if not value.isdecimal() or len(value) > 4 or int(value) not in wnids:
            raise Fault(f"class {shown(value)}; expected a number that meta.mat names")
        if wnids[int(value)] not in places:
            raise Fault(f"class {value} is {shown(wnids[int(value)])} in meta.mat, which is no class")
        return places[wnids[int(value)]]

    return read


def _kit_synsets(path: Path) -> dict[int, str]:
    """Return the development kit's number -> synset id."""
    if not path.is_file():
        raise AnnotationError(
            f"{KIT} numbers classes in the development kit's own order: {path} is needed to tell which is which"
        )
    try:
        from scipy.io.matlab import MatReadError, loadmat
    except ImportError as error:
        raise AnnotationError(f"reading {path} needs scipy: pip install scipy") from error
    try:
        synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        NotImplementedError,
        MatReadError,
        zlib.error,
    ) as error:
        raise AnnotationError(f"cannot read {path}: {error}") from error
