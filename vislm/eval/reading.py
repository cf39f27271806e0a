"""Reading annotation files row by row: a bad row is named and left out, a bad file is an error."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vislm.errors import AnnotationError, UsageError
from vislm.eval.coco import is_safe_name

T = TypeVar("T")


class Fault(ValueError):
    """What is wrong with one row. :func:`build_rows` catches it and adds where the row is."""


def find_file(root: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of ``names`` that exists below ``root``, as it is or with ``.gz`` appended.

    Raises:
        UsageError: ``root`` is not a folder.
        AnnotationError: none exists; the message says what was looked for.
    """
    found = find_optional(root, names)
    if found is None:
        raise AnnotationError(f"{root} holds no {what}; expected {' or '.join(names)}")
    return found


def find_optional(root: Path, names: Sequence[str]) -> Path | None:
    """Return what :func:`find_file` does, or None."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    return next((root / n for name in names for n in (name, f"{name}.gz") if (root / n).is_file()), None)


def find_folder(root: Path, names: Sequence[str]) -> Path:
    """Return the first of the folders ``names`` that exists below ``root``, else the first name (pictures missing)."""
    return next((root / n for n in names if (root / n).is_dir()), root / names[0])


def read_text(path: Path) -> str:
    """Return the text of a file, unpacked if its name ends in .gz.

    Raises:
        AnnotationError: not readable, not UTF-8, a broken archive.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise AnnotationError(f"cannot read {path}: {error}") from error


def read_json(path: Path, kind: type[T], *, unique_keys: bool = False) -> T:
    """Return the content of a JSON file that must be an object (``dict``) or a list (``list``).

    Args:
        path: the file, perhaps .gz.
        kind: what it must hold at the top.
        unique_keys: refuse objects that hold a key twice (of which Python would silently keep the last).

    Raises:
        AnnotationError: not JSON, NaN or Infinity, a key twice, another kind of value.
    """
    text = read_text(path)
    try:
        hook = _unique if unique_keys else None
        data = json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, kind):
        raise AnnotationError(f"{path} holds a {type(data).__name__} at the top; expected a {kind.__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {reprlib.repr(key)} appears twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def rows_of(path: Path, data: dict[str, Any], key: str) -> list[Any]:
    """Return the list under ``key`` of a file's object.

    Raises:
        AnnotationError: it is missing or something else.
    """
    rows = data.get(key)
    if not isinstance(rows, list):
        raise AnnotationError(f"{path}: {key!r} is {type(rows).__name__}; expected a list")
    return rows


def build_rows(
    path: Path, rows: Iterable[Any], build: Callable[[dict[str, Any]], T], faults: list[str], *, id_key: str = ""
) -> list[T]:
    """Build something of every row; rows that raise :class:`Fault` are left out and named in ``faults``.

    Args:
        path: the file that the rows come from; named in the faults.
        rows: what should be objects.
        build: makes one thing of a row.
        faults: grows by one line per bad row.
        id_key: a key whose value names the row besides its place.
    """
    built: list[T] = []
    for number, row in enumerate(rows, start=1):
        where = f"{path.name}: entry {number}"
        if isinstance(row, dict) and id_key in row:
            where += f" ({id_key} {shown(row[id_key])})"
        try:
            if not isinstance(row, dict):
                raise Fault(f"is a {type(row).__name__}; expected an object")
            built.append(build(row))
        except Fault as fault:
            faults.append(f"{where}: {fault}")
    return built


def shown(value: Any) -> str:
    """Return a short form of any value for a message."""
    return reprlib.repr(value)


def text_of(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """Return a text of the row; empty ones are faults unless allowed."""
    value = row.get(key)
    if not isinstance(value, str):
        raise Fault(f"has no text under {key!r}" if value is None else f"{key} is {shown(value)}; expected a text")
    if not empty and not value.strip():
        raise Fault(f"{key} is empty")
    return value


def id_of(row: dict[str, Any], key: str) -> str:
    """Return a number or a text of the row as text."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise Fault(f"{key} is {shown(value)}; expected a number or a text")
    if isinstance(value, int) and abs(value) >= _HUGE:
        raise Fault(f"{key} is {shown(value)}; expected a smaller number")
    return str(value)


_HUGE = 10**18  # Python refuses to print integers of thousands of digits


def whole_of(row: dict[str, Any], key: str, low: int = 0, high: int = _HUGE) -> int:
    """Return a whole number of the row, from ``low`` to below ``high``."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
        limit = f" from {low} to {high - 1}" if high < _HUGE else ""
        raise Fault(f"{key} is {shown(value)}; expected a whole number{limit}")
    return value


def texts_of(row: dict[str, Any], key: str) -> list[str]:
    """Return a list of texts of the row."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise Fault(f"{key} is {shown(value)}; expected a list of texts")
    return value


def safe_path(folder: Path, name: str) -> Path:
    """Return a picture's path; a name that leaves the folder is a fault."""
    if not is_safe_name(name):
        raise Fault(f"names an image outside its folder: {shown(name)}")
    return folder / name


class Once:
    """Makes ids that appear twice a fault."""

    def __init__(self, what: str) -> None:
        self.what, self.seen = what, set[str]()

    def __call__(self, value: str) -> str:
        """Return ``value`` if it is new."""
        if value in self.seen:
            raise Fault(f"{self.what} {shown(value)} appears twice")
        self.seen.add(value)
        return value
