"""MMBench's tables: tab-separated, with pictures in base64."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import dataclasses
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vislm.errors import AnnotationError, UsageError
from vislm.eval.protocol import Stored
from vislm.eval.reading import Fault, Once, read_text, shown

PASS = 1_000_000
"""Added to a question's index for each further rotation of its options."""
NEEDED = ("index", "question", "A", "B", "image")
_LETTERS = "ABCDEFGH"
_DIGITS = 12
_REFERENCE = 64  # an image cell no longer than this is the index of the row that holds the picture


@dataclass(frozen=True)
class Choice:
    """One row: a question with one order of its options."""

    index: int
    text: str
    hint: str
    options: dict[str, str]
    """Letter -> text, A first."""
    answer: str | None
    """The right letter; None in test files."""
    image: Stored
    category: str = ""
    ability: str = ""
    """The column l2-category."""

    @property
    def question(self) -> int:
        """Index of the question, the same in all rotations."""
        return self.index % PASS

    @property
    def rotation(self) -> int:
        """Number of the rotation, from 0."""
        return self.index // PASS

    def turned(self, index: int, options: dict[str, str], answer: str | None) -> Choice:
        """Return the same question with its options in another order."""
        return dataclasses.replace(self, index=index, options=options, answer=answer)


def read_table(path: Path, faults: list[str]) -> tuple[Path, list[Choice]]:
    """Return the file and its good rows; bad rows are named by line and index in ``faults``.

    Raises:
        UsageError: no such file or folder.
        AnnotationError: a folder with no or several tables, a file that is no table or lacks columns.
    """
    file = _table_in(path)
    choices: list[Choice] = []
    pictures = _Pictures()
    once = Once("index")
    rows = list(_rows(file))
    for _, row in rows:
        pictures.note(row)
    for line, row in rows:
        try:
            choices.append(_choice(row, once, pictures))
        except Fault as fault:
            faults.append(f"{file.name}, line {line} (index {shown(row.get('index'))}): {fault}")
    return file, choices


def _table_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{path} is neither a file nor a folder")
    tables = sorted(path.glob("*.tsv"))
    if len(tables) != 1:
        names = ", ".join(t.name for t in tables) or "none"
        raise AnnotationError(f"{path} must hold one .tsv table, found {names}; or name the table itself")
    return tables[0]


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line that each record ends on, and the record."""
    with _long_cells():
        reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            missing = [name for name in NEEDED if name not in header]
            if missing:
                raise AnnotationError(f"{file} lacks the columns {', '.join(missing)}; expected MMBench's .tsv table")
            for record in reader:
                if record:
                    cells = dict(zip(header, record, strict=False))
                    yield reader.line_num, cells if len(record) == len(header) else {**cells, _RAGGED: str(len(record))}
        except csv.Error as error:
            raise AnnotationError(f"{file}, line {reader.line_num}: no tab-separated table ({error})") from error


_RAGGED = "\0cells"


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be as long as pictures are; the limit belongs to the process and is put back."""
    old = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(old)


class _Pictures:
    """The decoded image cells; rows may name another row's picture by its index."""

    def __init__(self) -> None:
        self._cells: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}

    def note(self, row: dict[str, str]) -> None:
        """Remember a row's picture for rows that refer to it."""
        cell = row.get("image", "")
        if len(cell) > _REFERENCE:
            self._cells.setdefault(row["index"], cell)

    def of(self, row: dict[str, str]) -> Stored:
        """Return a row's picture."""
        cell = row["image"]
        if len(cell) <= _REFERENCE:
            if cell not in self._cells:
                raise Fault(f"image {shown(cell)} is neither base64 nor the index of a row with a picture")
            cell = self._cells[cell]
        if cell not in self._stored:
            try:
                data = base64.b64decode(cell, validate=True)
            except (binascii.Error, ValueError) as error:
                raise Fault(f"image is not base64 ({error})") from None
            self._stored[cell] = Stored(f"image of index {row['index']}", data)
        return self._stored[cell]


def _choice(row: dict[str, str], once: Once, pictures: _Pictures) -> Choice:
    if _RAGGED in row:
        raise Fault(f"has {row[_RAGGED]} cells, the header another number")
    if not row["index"].isdecimal() or len(row["index"]) > _DIGITS:
        raise Fault("index is no whole number")
    index = int(once(str(int(row["index"]))))
    cells = {name: "" if value.strip().lower() == "nan" else value for name, value in row.items() if name != "image"}
    if not cells["question"].strip():
        raise Fault("question is empty")
    letters = [letter for letter in _LETTERS if cells.get(letter, "").strip()]
    if letters != list(_LETTERS[: len(letters)]) or len(letters) < 2:
        raise Fault(f"has the options {letters}; expected at least A and B, without a gap")
    answer = cells.get("answer", "").strip() or None
    if answer is not None and answer not in letters:
        raise Fault(f"answer {shown(answer)} is none of the options {letters}")
    options = {letter: cells[letter] for letter in letters}
    category, ability = cells.get("category", ""), cells.get("l2-category", "")
    return Choice(
        index, cells["question"], cells.get("hint", "").strip(), options, answer, pictures.of(row), category, ability
    )
