"""Runs that can stand side by side: the same benchmark, protocol and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vislm.errors import UsageError
from vislm.eval.compare import RunRecord, check_same, read_run
from vislm.eval.compare_tables import labels


@dataclass(frozen=True)
class Bundle:
    """Runs on the same samples; the first one is what the others are compared with."""

    runs: list[RunRecord]
    labels: list[str]
    """One per run, short and different from each other."""
    apart: str = ""
    """Why they do not stand beside earlier runs of the same benchmark."""

    @property
    def name(self) -> str:
        """The benchmark."""
        return str(self.runs[0].results.get("benchmark", "benchmark"))

    def flipped(self, other: int) -> list[str]:
        """Return the ids of samples whose score in the first run and in run ``other`` differs."""
        first, second = self.runs[0].rows, self.runs[other].rows
        return [i for i in first if first[i]["score"] != second[i]["score"]]


def read_bundles(folders: Sequence[str | Path]) -> list[Bundle]:
    """Read run folders and put those together that can be compared, in the order of the folders.

    Raises:
        RunFolderError: a folder that holds no finished run.
        UsageError: no folder, or one that is named twice.
    """
    if not folders:
        raise UsageError("no run folder given; name one or more folders that vislm eval wrote")
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) != len(paths):
        raise UsageError(f"a run folder is named twice: {' '.join(map(str, folders))}")
    groups: list[tuple[list[RunRecord], str]] = []
    for folder in folders:
        run, apart = read_run(folder), ""
        for group, _ in groups:
            reason = _unlike(group[0], run)
            if not reason:
                group.append(run)
                break
            if group[0].results.get("benchmark") == run.results.get("benchmark"):
                apart = reason
        else:
            groups.append(([run], apart))
    return [Bundle(group, _labels(group), apart) for group, apart in groups]


def _unlike(a: RunRecord, b: RunRecord) -> str:
    """Return why two runs cannot be paired; nothing if they can."""
    try:
        check_same(a, b)
    except UsageError as error:
        return str(error)
    return ""


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return the methods of each run, behind the model where the runs differ in it or have no methods at all."""
    models = [str(run.config.get("model", run.folder.name)) for run in runs]
    if any(_has_methods(run) for run in runs):
        methods = labels([_readable(run) for run in runs])
        named = methods if len(set(models)) == 1 else [f"{m}, {k}" for m, k in zip(models, methods, strict=True)]
    else:
        named = models
    unlike = [n if named.count(n) == 1 else f"{n} ({run.folder.name})" for n, run in zip(named, runs, strict=True)]
    return [n if unlike.count(n) == 1 else f"{n} #{k}" for k, n in enumerate(unlike, start=1)]


def _has_methods(run: RunRecord) -> bool:
    return bool(run.config.get("interventions"))


def _readable(run: RunRecord) -> RunRecord:
    """Return the run with its methods as texts, whatever a damaged run.json holds."""
    methods = run.config.get("interventions") or ()
    texts = [str(m) for m in methods] if isinstance(methods, (list, tuple)) else [str(methods)]
    return RunRecord(run.folder, {**run.config, "interventions": texts}, run.results, run.rows)
