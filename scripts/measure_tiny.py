"""Measure the embedded model on unseen scenes: the tables of docs/benchmarks.md and of the model card.

    python scripts/measure_tiny.py --out out/measure

POPE (three splits) and CHAIR for every setting, the oracles and the grey control, and counts, colours, positions. A
killed run is resumed by running it again. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vislm import load_lmm, registry
from vislm.data.scene_types import Scene
from vislm.data.scenes import generate_scenes, write_scenes
from vislm.data.turns import Turn, colour_turn, count_turn, position_turn, singletons
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.questions.pope_questions import SPLITS
from vislm.eval.running.runner import run
from vislm.lmm.model import LMM
from vislm.report.tables import markdown_table

SEED = 13579
"""Scenes that no training, calibration or decision has used."""

PRUNING = [
    spec.format(keep)
    for keep in (32, 16, 8, 4)
    for spec in ("random:keep={}", "fastv:keep={}", "flowcut:keep={},positions=original", "flowcut:keep={}")
]
SETTINGS: list[tuple[list[str], list[str]]] = [
    ([], []),
    *(([p], []) for p in PRUNING),
    ([], ["vhr:alpha=1.5"]),
    ([], ["vhr:alpha=2"]),
    ([], ["vhr:alpha=1.5,outlier_rule=false"]),
    ([], ["vhr:alpha=2,outlier_rule=false"]),
    (["flowcut:keep=16,positions=original"], ["vhr:alpha=1.5"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--model", default="vislm-tiny")
    parser.add_argument("--part", default="0/1", help="k/n: only every n-th setting from k on; run all parts, then 0/1")
    options = parser.parse_args()
    folder = options.out / "scenes"
    if not (folder / "instances.json").is_file():
        write_scenes(folder, options.scenes, SEED)
    lmm = load_lmm(options.model)
    part, parts = map(int, options.part.split("/"))
    chosen = SETTINGS[part::parts]
    rows = [measure(lmm, folder, options.out, prune, heads, options.captions) for prune, heads in chosen]
    if parts > 1:
        return
    print(markdown_table(rows))
    print(controls(lmm, folder, options.out))
    print(markdown_table([skills(lmm, list(generate_scenes(options.captions, SEED)))]))


def measure(lmm: LMM, folder: Path, out: Path, prune: list[str], heads: list[str], captions: int) -> dict[str, Any]:
    """Return one row of the table."""
    name = "+".join([*prune, *heads]).replace(":", "-").replace("=", "").replace(",", "-") or "full"
    methods = [registry.build("pruning", p) for p in prune] + [registry.build("heads", h) for h in heads]
    with lmm.using(*methods):
        pope = run(load_benchmark("pope", folder), lmm, out / name / "pope", batch_size=128, progress=True)
        chair = run(load_benchmark("chair", folder), lmm, out / name / "chair", batch_size=128, limit=captions)
    splits, caption = pope["metrics"], chair["metrics"]
    row: dict[str, Any] = {
        "setting": " + ".join([*prune, *heads]) or "all tokens",
        "tokens": round(pope["visual_tokens_kept"]),
    }
    for split in SPLITS:
        m = splits[split]
        row[split] = f"{m['accuracy']:.3f} / {m['f1']:.3f} / {m['yes_ratio']:.3f} / {m['auroc']:.3f}"
    row["CHAIR_i"], row["CHAIR_s"] = f"{caption['CHAIR_i']:.3f}", f"{caption['CHAIR_s']:.3f}"
    row["recall"], row["length"] = f"{caption['Recall']:.3f}", f"{caption['Length']:.1f}"
    row["mentions"] = f"{caption['Mentions']:.2f}"
    print(row, flush=True)
    return row


def controls(lmm: LMM, folder: Path, out: Path) -> str:
    """Return the table of the oracles and the grey control."""
    benchmark = load_benchmark("pope", folder, control="grey")
    grey = run(benchmark, lmm, out / "grey" / "pope", batch_size=128)["metrics"]
    rows = [
        {"control": name, **{s: grey["oracles"][s][name][key] for s in SPLITS}, "figure": key}
        for name in ("context_only", "true_theme")
        for key in ("best_accuracy", "accuracy_at_half", "auroc")
    ]
    rows += [
        {"control": "grey picture", **{s: grey[s][key] for s in SPLITS}, "figure": key}
        for key in ("accuracy", "yes_ratio", "auroc")
    ]
    return markdown_table([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])


def skills(lmm: LMM, scenes: list[Scene]) -> dict[str, str]:
    """Return the share of right answers about counts (one zero count a scene), colours and positions."""

    def share(make: Callable[[Scene, str], Turn], names: Callable[[Scene], list[str]]) -> str:
        asked = [(s, make(s, c)) for s in scenes for c in names(s)]
        texts: list[str] = []
        for start in range(0, len(asked), 256):
            part = asked[start : start + 256]
            answers = lmm.ask_many([s.image for s, _ in part], [t.question for _, t in part], max_new_tokens=6)
            texts += [a.text for a in answers]
        return f"{sum(t.answer == x for (_, t), x in zip(asked, texts, strict=True)) / len(asked):.3f}"

    return {
        "count": share(count_turn, lambda s: [*s.present, s.absent[0]]),
        "colour": share(colour_turn, lambda s: s.present),
        "position": share(position_turn, singletons),
    }


if __name__ == "__main__":
    main()
