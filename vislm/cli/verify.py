"""``vislm verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vislm.golden import Verdict


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder with golden fixtures (.safetensors, .json).")],
    data: Annotated[Path | None, typer.Option("--data", help="Where data sets lie that fixtures refer to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of a table.")] = False,
) -> None:
    """Compare the package with the authors' own numbers; exit code 1 if a fixture fails or nobody knows it."""
    from vislm.golden import verify_folder

    verdicts = []
    if not as_json:
        typer.echo(f"{'method':<12} {'case':<44} {'max error':>10}  result")
    for verdict in verify_folder(folder, data):
        verdicts.append(verdict)
        if not as_json:
            error = "-" if not verdict.comparisons else f"{verdict.max_error:.1e}"
            reason = f": {verdict.reason}" if verdict.reason else ""
            typer.echo(f"{verdict.method:<12} {verdict.case:<44} {error:>10}  {verdict.status}{reason}")
    if as_json:
        typer.echo(json.dumps([_as_dict(v) for v in verdicts], indent=1))
    else:
        counts = {s: sum(v.status == s for v in verdicts) for s in ("pass", "fail", "unknown")}
        typer.echo(f"{counts['pass']} passed, {counts['fail']} failed, {counts['unknown']} unknown")
    if any(v.status != "pass" for v in verdicts):
        raise typer.Exit(1)


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    error = verdict.max_error if verdict.comparisons else None
    return {
        "method": verdict.method,
        "case": verdict.case,
        "status": verdict.status,
        "max_error": None if error is None or error != error or error == float("inf") else error,
        "reason": verdict.reason,
        "comparisons": [
            {
                "name": c.name,
                "error": str(c.error) if c.error in (float("inf"),) or c.error != c.error else c.error,
                "tolerance": c.tolerance,
                "pass": c.passed,
            }
            for c in verdict.comparisons
        ],
    }
