"""The run folder: what was run, and one JSON line per finished sample."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vislm.errors import RunFolderError
from vislm.files import atomic_write

RUN, ROWS, LOCK, RESULTS = "run.json", "predictions.jsonl", "lock", "results.json"


class Store:
    """Appends rows so that a kill loses at most the batch in progress. Open it with :func:`open_store`."""

    def __init__(self, folder: Path, file: IO[str], rows: dict[str, dict[str, Any]]) -> None:
        self.folder, self._file, self.rows = folder, file, rows
        self._synced = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append finished samples (each has an "id"); flushed at once, on the disk within a second."""
        for row in rows:
            if row["id"] in self.rows:
                raise RunFolderError(f"sample {row['id']} is already in {self.folder / ROWS}")
            self.rows[row["id"]] = row
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > 1.0:
            self.sync()

    def sync(self) -> None:
        """Force everything onto the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        self.sync()
        with atomic_write(self.folder / RESULTS) as file:
            json.dump(results, file, indent=1, ensure_ascii=False)


@contextlib.contextmanager
def open_store(folder: Path, fingerprint: dict[str, Any]) -> Iterator[Store]:
    """Open a run folder for appending, new or to be resumed.

    Raises:
        RunFolderError: another process is writing there, the folder belongs to a run with another fingerprint (the
            differing fields are named), or its rows are damaged elsewhere than in the last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check_fingerprint(folder, json.loads(json.dumps(fingerprint)))
        rows = _repaired_rows(folder / ROWS)
        # a lone surrogate in an answer becomes its JSON escape
        with (folder / ROWS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            yield Store(folder, file, rows)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except OSError:
            raise RunFolderError(f"another process is writing to {folder}; wait for it or use another --out") from None
        yield


def _check_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    path = folder / RUN
    if not path.is_file():
        if (folder / ROWS).is_file():
            raise RunFolderError(f"{folder} holds predictions but no {RUN}; use another --out")
        with atomic_write(path) as file:
            json.dump(fingerprint, file, indent=1)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(old, dict):
        raise RunFolderError(f"{path} holds no fingerprint; use another --out")
    differing = [k for k in sorted({*old, *fingerprint}) if old.get(k) != fingerprint.get(k)]
    if differing:
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {fingerprint.get(k)!r} now" for k in differing)
        raise RunFolderError(f"{folder} belongs to another run ({shown}); use another --out")


def _repaired_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows by id; a torn last line is cut off the file."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return read_rows(path)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a predictions file by id, in the file's order.

    Raises:
        RunFolderError: the file cannot be read, a line is damaged, or an id occurs twice.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, TypeError, KeyError) as error:
            hint = "remove it or use another --out"
            raise RunFolderError(f"{path}, line {number} is damaged ({error}); {hint}") from error
    if len(rows) != len(lines):
        raise RunFolderError(f"{path} holds an id twice; use another --out")
    return rows
