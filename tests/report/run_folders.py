"""Run folders as ``vislm eval`` leaves them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCURACY = {"name": "accuracy", "kind": "mean", "columns": ["score"], "better": "higher"}


def row(number: int, right: bool = True, **changes: Any) -> dict[str, Any]:
    """A yes-no answer; two questions per picture."""
    label, picture = number % 2, f"{number // 2:03d}.png"
    answer = label if right else 1 - label
    return {
        "id": f"{picture}|{number}",
        "images": [picture],
        "group": picture,
        "prompt": f"Is thing {number} in the image?",
        "text": "yes ." if answer else "no .",
        "visual_tokens": 64,
        "visual_tokens_kept": 64,
        "seconds": 0.01,
        "truth": "yes" if label else "no",
        "answer": "yes" if answer else "no",
        "score": float(right),
        "values": {"label": float(label), "answer": float(answer), "margin": 2.0 if answer else -2.0},
        "parts": ["even" if number % 4 < 2 else "odd"],
        **changes,
    }


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> Path:
    """Write run.json, predictions.jsonl and results.json."""
    folder.mkdir(parents=True)
    stated = {"model": "toy", "interventions": [], "benchmark": "toyqa", "control": "none", "samples": "ab12"}
    stated |= {"protocol.suffix": "short", "max_new_tokens": 8, **(config or {})}
    found = {
        "benchmark": stated["benchmark"],
        "metrics": {"accuracy": 0.5, "even": {"accuracy": 0.25, "warnings": ["recall has no denominator"]}},
        "score": {"mean": 0.5, "standard_error": 0.1, "n": len(rows)},
        "per_group": {"cat": {"n": 4, "accuracy": 0.5}, "dog": {"n": 2, "accuracy": 1.0}},
        "n": len(rows),
        "n_unparsed": 0,
        "n_missing": 0,
        "figures": [ACCURACY],
        "broken": [],
        "config": stated,
        "versions": {"torch": "2"},
        "visual_tokens_kept": 64.0,
        "flops": 2e9,
        "milliseconds": 10.0,
        "batch_size": 4,
        **(results or {}),
    }
    (folder / "run.json").write_text(json.dumps(stated))
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
