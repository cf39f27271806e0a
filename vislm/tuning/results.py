"""What a search leaves behind: a schedule per budget that ``--prune`` reads, tables of all trials, a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vislm.files import atomic_write
from vislm.lmm.interventions import Intervention
from vislm.tuning.study import Result, Tried


@dataclass(frozen=True)
class Study:
    """What was searched, in words for the files' headers."""

    model: str
    method: str
    samples: int


def write_results(results: Sequence[Result], study: Study, out: Path) -> list[Path]:
    """Write trials.csv, trials.json, pareto.png and one schedule-BUDGET.yaml per budget; return their paths.

    A budget without any feasible trial has no schedule.
    """
    from vislm.tuning.plot import pareto_figure

    paths = [schedule_path(out, result) for result in results if result.best]
    for result in results:
        if result.best is not None:
            with atomic_write(schedule_path(out, result)) as file:
                file.write(schedule_text(result, result.best, study))
    rows = [row(result, tried) for result in results for tried in [result.defaults, *result.trials]]
    with atomic_write(out / "trials.csv") as file:
        file.write(_csv(rows))
    with atomic_write(out / "trials.json") as file:
        json.dump({**vars(study), "spaces": _spaces(results), "trials": rows}, file, indent=1)
    title = f"{study.method} on {study.model}, {study.samples} samples"
    return [*paths, out / "trials.csv", out / "trials.json", pareto_figure(results, out / "pareto.png", title)]


def schedule_path(out: Path, result: Result) -> Path:
    """Return where a budget's schedule is written."""
    return out / f"schedule-{str(result.budget).replace('=', '-')}.yaml"


def schedule_text(result: Result, best: Tried, study: Study) -> str:
    """Return the YAML of the best trial, with what it costs and how far it is from the full model as comments."""
    import yaml

    assert best.evaluation is not None
    cost, untuned = best.evaluation.cost, result.defaults
    where = "its defaults" if best.number is None else f"trial {best.number} of {len(result.trials)}"
    lines = [
        f"# {study.method} for {study.model} within {result.budget}, tuned on {study.samples} samples: {where}.",
        f"# Discrepancy {best.evaluation.discrepancy:.4g} (defaults: {_figure(untuned)}), cosine "
        f"{best.evaluation.cosine:.4f}.",
        f"# Cost: {cost.tokens:.1%} of the visual tokens over the layers, {cost.flops:.1%} of tower and prefill FLOPs.",
    ]
    options = {name: _plain(value) for name, value in {**result.options, **best.options}.items()}
    content = yaml.safe_dump({"method": study.method, "options": options}, sort_keys=False)
    return "\n".join(lines) + "\n" + content


def row(result: Result, tried: Tried) -> dict[str, Any]:
    """Return one line of the tables."""
    figures = tried.evaluation.row() if tried.evaluation else {}
    return {
        "budget": str(result.budget),
        "trial": "defaults" if tried.number is None else tried.number,
        "feasible": tried.feasible,
        **figures,
        "violation": tried.violation,
        "seconds": tried.seconds,
        "reason": tried.reason,
        **{f"option.{name}": _plain(value) for name, value in tried.options.items()},
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _spaces(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    return {str(r.budget): {name: str(values) for name, values in r.space.items()} for r in results}


def _figure(tried: Tried) -> str:
    if tried.evaluation is None:
        return "refused"
    return f"{tried.evaluation.discrepancy:.4g}{'' if tried.feasible else ', over the budget'}"


def _plain(value: Any) -> Any:
    """Return an option as YAML holds it; a method inside a method becomes {method, options}."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"method": cast(Intervention, value).name, "options": options}
    return list(value) if isinstance(value, tuple) else value
