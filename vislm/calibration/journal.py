"""What a search has found so far, one JSON line per finding, so that a killed one goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vislm.errors import RunFolderError


class Journal:
    """Findings by key. Open it with :func:`open_journal`."""

    def __init__(self, file: IO[bytes], found: dict[str, Any]) -> None:
        self._file, self.found = file, found

    def add(self, findings: Mapping[str, Any]) -> None:
        """Append findings (key -> JSON value) and force them onto the disk."""
        for key, value in findings.items():
            self._file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
            self.found[key] = value
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_journal(path: Path, fingerprint: Mapping[str, Any]) -> Iterator[Journal]:
    """Open a journal, new or to be continued; its first line is the fingerprint.

    Args:
        path: of the file.
        fingerprint: what determines the findings; JSON types.

    Raises:
        RunFolderError: another process is writing it, it belongs to another search (the differing fields are named), or
            it is damaged elsewhere than in its last line.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except OSError:
            raise RunFolderError(f"another process is writing {path}; wait for it or use another --out") from None
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # the kill came in the middle of a line
            file.truncate(len(whole))
        lines = whole.splitlines()
        current = json.loads(json.dumps(fingerprint))
        if lines:
            _check(path, lines[0], current)
        else:
            file.write(json.dumps(current).encode() + b"\n")
        yield Journal(file, _findings(path, lines[1:]))


def _check(path: Path, line: bytes, current: dict[str, Any]) -> None:
    try:
        old = json.loads(line)
    except ValueError as error:
        raise RunFolderError(f"{path}, line 1 is damaged ({error}); remove it or use another --out") from error
    if not isinstance(old, dict):
        raise RunFolderError(f"{path} holds no fingerprint; remove it or use another --out")
    differing = [key for key in sorted({*old, *current}) if old.get(key) != current.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {old.get(key)!r} there, {current.get(key)!r} now" for key in differing)
        raise RunFolderError(f"{path} belongs to another search ({shown}); use another --out")


def _findings(path: Path, lines: list[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, line in enumerate(lines, start=2):
        try:
            row = json.loads(line)
            found[row["key"]] = row["value"]
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{path}, line {number} is damaged ({error!r}); remove it or use another --out"
            ) from error
    return found
