"""Do two runs on the same samples differ, and by how much? Reads run folders; needs no model and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vislm.errors import RunFolderError, UsageError
from vislm.eval.auroc import Auroc
from vislm.eval.protocol import Figure
from vislm.eval.running.store import RESULTS, ROWS, RUN, differing, read_json, read_rows
from vislm.eval.uncertainty import Difference, Interval, difference, interval, mcnemar, standard_error

Floats = NDArray[np.float64]
_SAME = ("benchmark", "control", "max_new_tokens", "samples")
"""Fields of the fingerprint that must agree, beside the protocol."""
_SHOWN = 5
_COLUMNS = {"mean": 1, "ratio": 2, "f1": 2, "auroc": 2}
"""Columns that each kind of figure is made of."""
_FIGURE = {field.name for field in fields(Figure)}
_HUGE = 1e300  # also false for infinity and NaN


@dataclass(frozen=True)
class RunRecord:
    """A finished run as its folder tells it."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def figures(self) -> list[Figure]:
        """What the benchmark is compared by."""
        return [Figure(**{**f, "columns": tuple(f["columns"])}) for f in self.results["figures"]]

    @property
    def parts(self) -> list[str]:
        """Splits or sub-tasks, in order of appearance."""
        return list(dict.fromkeys(part for row in self.rows.values() for part in row.get("parts", ())))


@dataclass(frozen=True)
class Comparison:
    """One figure of one part in both runs."""

    part: str
    """Split or sub-task; "all": every part together, a sample that belongs to several counted in each."""
    figure: Figure
    n: int
    a: float
    a_error: float
    """Standard error, clustered by group."""
    b: float
    b_error: float
    difference: Difference
    """a - b; wins and losses count samples whose score differs, McNemar's test is on them."""


def read_run(folder: str | Path) -> RunRecord:
    """Return what a run folder holds.

    Raises:
        RunFolderError: it is not a finished run of this package.
    """
    path = Path(folder)
    if not (path / RESULTS).is_file():
        what = "an unfinished run; start it again to resume it" if (path / RUN).is_file() else "no run"
        raise RunFolderError(f"{path} holds {what}")
    results, rows = read_json(path / RESULTS), read_rows(path / ROWS)
    if "figures" not in results:
        raise RunFolderError(f"{path} was written by an earlier version, without scores per sample; run it again")
    faults = [f"{RESULTS}: figures {results['figures']!r}"] if not _are_figures(results["figures"]) else []
    faults += [f"{ROWS}: {i}: {fault}" for i, row in rows.items() if (fault := _fault(row))]
    if faults:
        raise RunFolderError(f"{path}: {len(faults)} faults: {'; '.join(faults[:_SHOWN])}; run it again")
    return RunRecord(path, read_json(path / RUN), results, rows)


def compare(a: RunRecord, b: RunRecord, *, resamples: int = 2000, seed: int = 0) -> list[Comparison]:
    """Return every figure of every part, then of all, for run A minus run B: paired bootstrap and McNemar's test.

    Whole groups (pictures) are drawn, see ``vislm.eval.uncertainty``.

    Raises:
        UsageError: the runs followed different protocols or finished different samples; names the fields or ids.
    """
    check_same(a, b)
    found = []
    for part in [*a.parts, "all"]:
        for figure in a.figures:
            ids = [i for i in _members(a, part) if all(_columns(r.rows[i], figure) is not None for r in (a, b))]
            if ids:
                found.append(_compared(a, b, part, ids, figure, resamples, seed))
    return found


def samples_of(run: RunRecord, figure: Figure) -> int:
    """Return how many samples of one run a figure over all parts is made of."""
    return sum(_columns(run.rows[i], figure) is not None for i in _members(run, "all"))


def figure_interval(run: RunRecord, figure: Figure, *, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Return a figure over all parts of one run with its 95 % interval; None where no sample has its columns."""
    ids = [i for i in _members(run, "all") if _columns(run.rows[i], figure) is not None]
    if not ids:
        return None
    values, groups = _values(run, ids, figure)
    return interval(values, groups, _statistic(figure), resamples, seed)


def unlike(a: RunRecord, b: RunRecord) -> list[str]:
    """Return the fields of model and methods in which two comparable runs differ: what the comparison is about."""
    return differing(a.config, b.config)


def _are_figures(figures: Any) -> bool:
    if not isinstance(figures, list) or not all(isinstance(f, dict) and f.keys() == _FIGURE for f in figures):
        return False
    return all(
        _are_texts([f["name"], f["kind"], f["better"]]) and _are_texts(f["columns"], _COLUMNS.get(f["kind"], -1))
        for f in figures
    )


def _are_texts(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        return False
    return count is None or len(values) == count


def _fault(row: Mapping[str, Any]) -> str | None:
    """Return what makes a row unfit for comparing."""
    if "score" not in row or not (row["score"] is None or _is_number(row["score"])):
        return f"score {row.get('score')!r}"
    if not isinstance(row.get("group"), str):
        return f"group {row.get('group')!r}"
    values = row.get("values", {})
    if not isinstance(values, dict) or not all(map(_is_number, values.values())):
        return f"values {values!r}"
    return None if _are_texts(row.get("parts", [])) else f"parts {row['parts']!r}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _HUGE


def check_same(a: RunRecord, b: RunRecord) -> None:
    """Refuse runs that cannot be paired.

    Raises:
        UsageError: they followed different protocols or finished different samples; names the fields or ids.
    """
    found = [f for f in differing(a.config, b.config) if f in _SAME or f.startswith("protocol.")]
    if found:
        shown = "; ".join(f"{f}: {a.config.get(f)!r} and {b.config.get(f)!r}" for f in found)
        raise UsageError(f"{a.folder} and {b.folder} followed different protocols ({shown}); compare like with like")
    if a.rows.keys() != b.rows.keys():
        only_a, only_b = sorted(a.rows.keys() - b.rows.keys()), sorted(b.rows.keys() - a.rows.keys())
        raise UsageError(
            f"the runs finished different samples: {len(only_a)} only in {a.folder} {only_a[:_SHOWN]}, {len(only_b)} "
            f"only in {b.folder} {only_b[:_SHOWN]}; run both on the same samples"
        )


def _members(run: RunRecord, part: str) -> list[str]:
    """Return the ids of a part's samples; for "all", once for each part that a sample belongs to."""
    if part == "all":
        return [i for i, row in run.rows.items() for _ in row.get("parts") or ("all",)]
    return [i for i, row in run.rows.items() if part in row.get("parts", ())]


def _compared(
    a: RunRecord, b: RunRecord, part: str, ids: Sequence[str], figure: Figure, resamples: int, seed: int
) -> Comparison:
    (x, groups), (y, _) = _values(a, ids, figure), _values(b, ids, figure)
    statistic = _statistic(figure)
    found = difference(x, y, groups, statistic, resamples, seed)
    scores = [(a.rows[i]["score"], b.rows[i]["score"]) for i in dict.fromkeys(ids)]
    wins, losses = (sum(p is not None and q is not None and s * (p - q) > 0 for p, q in scores) for s in (1, -1))
    found = replace(found, wins=wins, losses=losses, mcnemar=mcnemar(wins, losses))
    errors = (_error(z, groups, figure, resamples, seed) for z in (x, y))
    return Comparison(
        part, figure, len(ids), float(statistic(x)), next(errors), float(statistic(y)), next(errors), found
    )


def _error(values: Floats, groups: Sequence[str] | None, figure: Figure, resamples: int, seed: int) -> float:
    """Return the standard error: of a ratio by its linear part, of an AUROC from the width of its interval."""
    if figure.kind == "auroc":
        found = interval(values, groups, Auroc(), resamples, seed)
        return (found.high - found.low) / (2 * 1.96)
    top, bottom = values.T
    if not bottom.any():
        return float("nan")
    return standard_error(((top - _ratio(values) * bottom) / bottom.mean()).tolist())


def _columns(row: Mapping[str, Any], figure: Figure) -> list[float] | None:
    """Return the sample's values of a figure's columns; None where it lacks one."""
    values = {**row.get("values", {}), "score": row["score"]}
    found = [values.get(c) for c in figure.columns]
    return None if any(v is None for v in found) else [float(v) for v in found]  # pyright: ignore[reportArgumentType]


def _values(run: RunRecord, ids: Sequence[str], figure: Figure) -> tuple[Floats, list[str] | None]:
    """Return what a figure's statistic is computed from: (n, k) per sample, or sums per group, which draw faster."""
    columns = np.asarray([_columns(run.rows[i], figure) for i in ids], dtype=np.float64)
    groups = [run.rows[i]["group"] for i in ids]
    if figure.kind == "auroc":
        return columns, groups
    if figure.kind == "mean":
        terms = np.stack([columns[:, 0], np.ones(len(ids))], axis=1)
    elif figure.kind == "ratio":
        terms = columns
    else:  # f1 = 2 TP / (positives + predicted positives)
        truth, answer = columns.T
        terms = np.stack([2 * truth * answer, truth + answer], axis=1)
    places: dict[str, int] = {}
    member = [places.setdefault(g, len(places)) for g in groups]
    return np.asarray([np.bincount(member, weights=term) for term in terms.T], dtype=np.float64).T, None


def _statistic(figure: Figure) -> Any:
    return Auroc() if figure.kind == "auroc" else _ratio


def _ratio(terms: Floats) -> float:
    top, bottom = terms.sum(axis=0)
    return float(top / bottom) if bottom else 0.0
