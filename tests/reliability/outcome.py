"""What a trial reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """One row of docs/reliability.md."""

    trial: str
    cases: int
    found: dict[str, Any]
    """What was counted."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    """Cases that broke a promise, each with what repeats it."""


def in_own_process(module: str, *arguments: object) -> dict[str, Any]:
    """Run ``module``'s main in a fresh interpreter that prints JSON; a crash there is a result here."""
    command = [sys.executable, str(Path(__file__).with_name(module)), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode != 0:
        return {"crashed": f"{module} {arguments}: exit code {ended.returncode}: {ended.stderr[-2000:]}"}
    return json.loads(ended.stdout.splitlines()[-1])


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
