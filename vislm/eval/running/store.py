"""The run folder: what was run, and one JSON line per finished sample.

run.json is the fingerprint, predictions.jsonl the rows, results.json the end. While several processes work, each
appends to a file of its own (predictions.00003.jsonl), and the first one merges them. Whatever is killed when: a whole
line is a finished sample, and the next start puts together what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vislm.errors import RunFolderError
from vislm.files import atomic_write

RUN, ROWS, LOCK, RESULTS = "run.json", "predictions.jsonl", "lock", "results.json"
_PARTS = "predictions.[0-9]*.jsonl"


def part_name(rank: int) -> str:
    """Return the name of the file to which one of several processes appends."""
    return f"predictions.{rank:05d}.jsonl"


class RowFile:
    """Appends rows so that a kill loses at most the batch in progress. Open it with :func:`open_rows`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._synced = time.monotonic()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append finished samples: with the system at once, on the disk within a second.

        Raises:
            RunFolderError: the disk is full or the file cannot grow; what was added before stays.
        """
        data = "".join(map(_line, rows)).encode("utf-8", errors="backslashreplace")  # a lone surrogate, as its escape
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise _full(f"{len(data):,} bytes to {self._path}", error) from error
        if time.monotonic() - self._synced > 1.0:
            self.sync()

    def sync(self) -> None:
        """Force everything onto the disk."""
        with _writing(self._path):
            os.fsync(self._descriptor)
        self._synced = time.monotonic()


@contextlib.contextmanager
def open_rows(path: Path) -> Iterator[RowFile]:
    """Open a rows file for appending; a torn last line is cut off first."""
    _cut_torn_line(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        rows = RowFile(path, descriptor)
        yield rows
        rows.sync()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_folder(folder: Path, fingerprint: Mapping[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    """Claim a run folder, new or to be resumed, and yield the finished rows by id; one process may hold it.

    Raises:
        RunFolderError: another process holds it, it belongs to a run with another fingerprint (the differing fields
            are named), or its rows are damaged elsewhere than in the last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for left in folder.glob(".*.tmp-*"):  # of a process that was killed while it wrote; the lock says it is gone
            left.unlink(missing_ok=True)
        _check_fingerprint(folder, json.loads(json.dumps(fingerprint)))
        yield collect(folder)


def collect(folder: Path, order: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Merge the files of all processes into predictions.jsonl and return the rows by id.

    Args:
        folder: the run folder, which the caller has claimed.
        order: ids that come first, in this order; without it rows stay as they were finished.

    Raises:
        RunFolderError: rows that are damaged elsewhere than in a file's last line.
    """
    parts = sorted(folder.glob(_PARTS))
    for path in (folder / ROWS, *parts):
        _cut_torn_line(path)
    found = read_rows(folder / ROWS) if (folder / ROWS).is_file() else {}
    rows = dict(found)
    for part in parts:  # a row may be in both: the kill came between merging and removing
        rows = {**read_rows(part), **rows}
    rows = {i: rows[i] for i in dict.fromkeys([*(i for i in order if i in rows), *found, *rows])}
    if list(rows) != list(found):
        with _writing(folder / ROWS), atomic_write(folder / ROWS, "wb") as file:
            file.writelines(_line(row).encode("utf-8", errors="backslashreplace") for row in rows.values())
    for part in parts:
        part.unlink()
    return rows


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json at once or not at all.

    Raises:
        RunFolderError: the disk is full or the folder read-only.
    """
    with _writing(folder / RESULTS), atomic_write(folder / RESULTS) as file:
        json.dump(results, file, indent=1, ensure_ascii=True)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a predictions file by id, in the file's order.

    Raises:
        RunFolderError: the file cannot be read, a line is damaged, or an id occurs twice.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _check_row(row)
            rows[row["id"]] = row
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hint = "remove it or use another --out"
            raise RunFolderError(f"{path}, line {number} is damaged ({error}); {hint}") from error
    if len(rows) != len(lines):
        raise RunFolderError(f"{path} holds an id twice; use another --out")
    return rows


def _check_row(row: Any) -> None:
    for key in ("id", "text"):
        if not isinstance(row[key], str):
            raise TypeError(f"{key} {row[key]!r} is no text")
    logits = row.get("candidates") or {}
    if not isinstance(logits, dict) or not all(type(v) in (int, float) for v in logits.values()):
        raise TypeError(f"candidates {logits!r} are no numbers by name")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in run.json or results.json.

    Raises:
        RunFolderError: it cannot be read or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def differing(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Return the fields, sorted, in which two fingerprints differ."""
    return [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k not in ignore]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


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
        with _writing(path), atomic_write(path) as file:
            json.dump(fingerprint, file, indent=1)
        return
    old = read_json(path)
    if fields := differing(old, fingerprint):
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {fingerprint.get(k)!r} now" for k in fields)
        raise RunFolderError(f"{folder} belongs to another run ({shown}); use another --out")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _full(str(path), error) from error


def _full(what: str, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"cannot write {what}: {error.strerror}; finished samples are kept, make room and run again to resume"
    )


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:  # from the end, in pieces: rows may fill gigabytes
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            file.truncate(end)
