"""Running every fixture of a folder."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from vislm.errors import AnnotationError, UsageError
from vislm.golden import checks
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, read_fixture

MODULES = {
    "amber discriminative": "amber",
    "coco caption metrics": "coco_caption",
    "coco detection map": "coco_detection",
    "image-text retrieval r@k": "retrieval",
    "k-nn classification (dino protocol)": "knn",
    "mme": "vqa",
    "scienceqa": "vqa",
    "vqa answer normalisation": "vqa",
    "vqa answer normalisation / textvqa accuracy": "vqa",
}
"""A fixture's method -> its check's module, where they differ."""


@dataclass(frozen=True)
class Verdict:
    """What came of one fixture."""

    method: str
    case: str
    status: Literal["pass", "fail", "unknown"]
    comparisons: list[Comparison] = field(default_factory=list)
    reason: str = ""

    @property
    def max_error(self) -> float:
        """The largest error of all comparisons."""
        return max((c.error for c in self.comparisons), default=float("nan"))


def verify_folder(folder: Path, data: Path | None = None) -> Iterator[Verdict]:
    """Run every ``.safetensors`` and ``.json`` fixture below ``folder``; yield verdicts in path order.

    A fixture that no check handles is "unknown", never passed. ``data`` is where data sets lie that a fixture refers
    to; by default folders named ``data`` beside ``folder`` and its parents are tried.

    Raises:
        UsageError: no such folder, or one without fixtures.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json"))
    if not paths:
        raise UsageError(f"{folder} holds no .safetensors or .json fixtures")
    places = [data] if data else [p / "data" for p in (folder.resolve(), *folder.resolve().parents[:3])]
    dirs = [p for p in places if p.is_dir()]
    for path in paths:
        yield _verify(path, str(path.relative_to(folder)), dirs)


def _verify(path: Path, case: str, data_dirs: list[Path]) -> Verdict:
    try:
        fixture = read_fixture(path, data_dirs)
    except AnnotationError as error:
        return Verdict("?", case, "unknown", reason=str(error))
    handled = {m.name for m in pkgutil.iter_modules(checks.__path__)}
    if MODULES.get(fixture.method, fixture.method) not in handled:
        return Verdict(fixture.method, case, "unknown", reason=f"no check for the method {fixture.method!r}")
    return _run(fixture, case)


def _run(fixture: Fixture, case: str) -> Verdict:
    check = import_module(f"{checks.__name__}.{MODULES.get(fixture.method, fixture.method)}").check
    try:
        outcomes = list(check(fixture))
    except Unhandled as reason:
        return Verdict(fixture.method, case, "unknown", reason=str(reason))
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        if os.environ.get("VISLM_DEBUG"):
            raise
        return Verdict(fixture.method, case, "fail", reason=f"{type(error).__name__}: {error}")
    comparisons = [c for c in outcomes if isinstance(c, Comparison)]
    skipped = [c.name for c in outcomes if isinstance(c, Skipped)]
    if not comparisons:
        return Verdict(fixture.method, case, "unknown", reason="the check compared nothing")
    worst = [c for c in comparisons if not c.passed]
    reason = "; ".join(f"{c.name}: error {c.error:.3g} > {c.tolerance:g}" for c in worst[:3])
    if skipped:
        reason = "; ".join(filter(None, [reason, f"not compared: {', '.join(skipped)}"]))
    return Verdict(fixture.method, case, "fail" if worst else "pass", comparisons, reason)
