"""Compare token pruning on the embedded model's unseen scenes, with paired intervals: a table of docs/benchmarks.md.

    python scripts/study_pruning.py --out out/pruning SETTING ...

A setting is what ``--prune`` takes, or a YAML file. POPE (adversarial split) and CHAIR; each setting's difference to a
parent (``SETTING@PARENT``) is bootstrapped over pictures. A killed run is resumed by running it again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vislm import load_lmm, registry
from vislm.data.scenes import write_scenes
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.running.runner import run
from vislm.eval.uncertainty import difference, interval
from vislm.lmm.model import LMM
from vislm.report.tables import markdown_table

SEED = 13579
"""Scenes that no training, calibration or decision has used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", help="e.g. divprune:keep=16, or staged.yaml@divprune:keep=16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--model", default="vislm-tiny")
    options = parser.parse_args()
    folder = options.out / "scenes"
    if not (folder / "instances.json").is_file():
        write_scenes(folder, options.scenes, SEED)
    lmm = load_lmm(options.model)
    rows = []
    for setting in options.settings:
        spec, _, parent = setting.partition("@")
        rows.append(row(lmm, folder, options.out, spec, parent))
        print(rows[-1], flush=True)
    print(markdown_table(rows))


def measure(lmm: LMM, folder: Path, out: Path, spec: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the results of POPE and CHAIR, and the run folder."""
    place = out / (spec.replace("/", "-").replace(":", "-").replace("=", "").replace(",", "-") or "full")
    with lmm.using(*([registry.build("pruning", spec)] if spec else [])):
        pope = run(load_benchmark("pope", folder), lmm, place / "pope", batch_size=128)
        chair = run(load_benchmark("chair", folder), lmm, place / "chair", batch_size=128)
    return pope, chair, place


def row(lmm: LMM, folder: Path, out: Path, spec: str, parent: str) -> dict[str, Any]:
    """Return one row of the table."""
    pope, chair, place = measure(lmm, folder, out, "" if spec == "full" else spec)
    right, pictures = verdicts(folder, place)
    m, c = pope["metrics"]["adversarial"], chair["metrics"]
    found: dict[str, Any] = {
        "setting": spec,
        "tokens": round(pope["visual_tokens_kept"], 1),
        "adversarial accuracy": str(interval(right, pictures)),
        "AUROC": f"{m['auroc']:.3f}",
        "yes": f"{m['yes_ratio']:.3f}",
        "CHAIR_i": f"{c['CHAIR_i']:.3f}",
        "recall": f"{c['Recall']:.3f}",
        "length": f"{c['Length']:.1f}",
    }
    if parent:
        _, _, other = measure(lmm, folder, out, "" if parent == "full" else parent)
        d = difference(right, verdicts(folder, other)[0], pictures)
        found["against"] = f"{parent}: {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return found


def verdicts(folder: Path, place: Path) -> tuple[list[float], list[str]]:
    """Return whether each adversarial question was answered right, and the picture it is about."""
    lines = (place / "pope" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {line["id"]: line["text"] for line in map(json.loads, lines)}
    benchmark = load_benchmark("pope", folder)
    asked = [q for q in benchmark.questions if q.split == "adversarial"]  # pyright: ignore[reportAttributeAccessIssue]
    said = [texts[f"{q.image}|{q.text}"] for q in asked]
    return [float(text.startswith(q.label)) for q, text in zip(asked, said, strict=True)], [q.image for q in asked]


if __name__ == "__main__":
    main()
