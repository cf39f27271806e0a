"""All trials, in two sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import annotations
import bombs
import commands
import disks
import kills
import paths
import pictures
import reports
from outcome import Outcome


@dataclass(frozen=True)
class Size:
    """How many cases each trial tries."""

    kills: int
    pictures: int
    annotations: int
    disks: int
    commands: int = 0
    seed: int = 0
    least: dict[str, int] = field(default_factory=dict)
    """Trial -> cases that must have been tried."""


_FIXED = {"bombs": 16, "paths": 40, "reports": 20}
QUICK = Size(60, 2_100, 2_100, 20, least={"kills": 50, "pictures": 2_000, "annotations": 2_000, "disks": 20, **_FIXED})
FULL = Size(500, 10_000, 20_000, 100, 20, least={"kills": 500, "pictures": 10_000, "annotations": 20_000, **_FIXED})


def trials(size: Size) -> dict[str, Callable[[], Outcome]]:
    """Return name -> trial."""
    real = {"commands": lambda: commands.trial(size.commands, size.seed)} if size.commands else {}
    return {
        "kills": lambda: kills.trial(size.kills, size.seed),
        **real,
        "disks": lambda: disks.trial(size.disks, size.seed),
        "pictures": lambda: pictures.trial(size.pictures, size.seed),
        "bombs": bombs.trial,
        "annotations": lambda: annotations.trial(size.annotations, size.seed),
        "paths": paths.trial,
        "reports": reports.trial,
    }
