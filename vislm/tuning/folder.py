"""The folder of a study: one process at a time, one question per folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vislm.errors import RunFolderError
from vislm.files import atomic_write

FINGERPRINT, LOCK = "study.json", "lock"


@contextlib.contextmanager
def study_folder(folder: Path, fingerprint: dict[str, Any]) -> Iterator[None]:
    """Hold a folder, new or to be continued, while the context is open.

    Args:
        folder: made if it is not there.
        fingerprint: what determines the trials; JSON types.

    Raises:
        RunFolderError: another process works in it, or it belongs to a study with another fingerprint (the differing
            fields are named).
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except OSError:
            raise RunFolderError(f"another process is tuning in {folder}; wait for it or use another --out") from None
        _check(folder / FINGERPRINT, json.loads(json.dumps(fingerprint)))
        yield


def _check(path: Path, fingerprint: dict[str, Any]) -> None:
    if not path.is_file():
        with atomic_write(path) as file:
            json.dump(fingerprint, file, indent=1)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not valid JSON: {error}") from error
    differing = [k for k in sorted({*old, *fingerprint}) if old.get(k) != fingerprint.get(k)]
    if differing:
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {fingerprint.get(k)!r} now" for k in differing)
        raise RunFolderError(f"{path.parent} belongs to another study ({shown}); use another --out")
