"""Compare head methods on the embedded model's unseen scenes, alone and with FlowCut: a table of docs/heads.md.

    python scripts/study_heads.py tune    --out out/heads METHOD ...
    python scripts/study_heads.py measure --out out/heads METHOD ...
    python scripts/study_heads.py table   --out out/heads

``tune`` makes the offline artefacts, tries a few options of each method on calibration scenes and keeps those with the
best accuracy over all POPE questions. ``measure`` runs them on other scenes: POPE in three splits and CHAIR, alone and
behind FlowCut at two budgets. ``table`` prints Markdown with paired 95 % intervals over pictures. No METHOD: all of
them. A killed run is resumed by running it again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vislm import load_lmm, registry
from vislm.calibration.run import calibrate_heads
from vislm.calibration.samples import load_samples
from vislm.calibration.settings import Settings
from vislm.data.scene_categories import CATEGORIES
from vislm.data.scenes import write_scenes
from vislm.errors import PlanConflict
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.captions.vocabulary import vocabulary_of
from vislm.eval.compare import Comparison, compare, figure_interval, read_run
from vislm.eval.effects import effect
from vislm.eval.protocol import Asked
from vislm.eval.running.runner import run
from vislm.heads.carve import carve
from vislm.lmm.model import LMM
from vislm.report.tables import markdown_table

CALIBRATION, TEST = (150, 97531), (500, 24680)
"""(scenes, seed); no training, calibration file or earlier decision has used either seed."""
BUDGETS = ("", "flowcut:keep=16", "flowcut:keep=8")
GRIDS: dict[str, Sequence[str]] = {
    "vhr": ("alpha=2", "alpha=1.5,outlier_rule=false", "alpha=2,outlier_rule=false", "alpha=3,outlier_rule=false"),
    "var": ("p=0.6", "p=0.3", "p=0.6,rho=0.3", "p=0.3,rho=0.3"),
    "imbalanced": ("", "alpha=0.35,beta=0.15", "alpha=1.4,beta=0.6"),
    "act": ("beta=0.4", "beta=0.4,threshold=0.05", "beta=0.1"),
    "pai": ("", "alpha=0.5", "alpha=0.2,gamma=1", "alpha=0.5,gamma=1"),
    "spin": ("", "suppressed_scale=0.5", "score=attention_paper", "score=attention_paper,suppressed_scale=0.5"),
    "ad_hh": ("", "threshold=0.2"),
    "vaf": ("", "enh_para=1.3,sup_para=0.9", "enh_para=1.15,sup_para=0.95,layers=0-3"),
    "air": ("", "lift=0.56", "beta=0"),
    "ilvad": ("", "alpha=5,beta=0.3", "alpha=2,beta=0.3"),
    "zerotuning": ("",),
    "vcd": ("", "alpha=0.5", "alpha=0.5,noise_step=200"),
    "dola": ("", "layers=1", "layers=3"),
    "opera": ("", "penalty_weight=0.5"),
    "carve": ("max_new_tokens=8,suffix=", "max_new_tokens=8,suffix=,reask=code_both_images"),
}
"""Method -> options that are tried; the published ones first."""
ARTEFACTS = {
    "var": ("dims", Settings(what="sinks", tau=2.0)),
    "act": ("heads", Settings(what="act")),
    "ad_hh": ("heads", Settings(what="ad_hh", top=2)),
    "air": ("heads", Settings(what="ad_hh", top=2)),
    "zerotuning": ("factors", Settings(what="zerotuning", score="likelihood")),
}
"""Method -> the option that names its offline file, and how the file is made."""
EXTRA = {"var": "tau=2", "opera": "num_beams=3,candidates=3"}
"""Options of every setting: the embedded model has no massive activations; three beams take a third of the time."""


class Carving:
    """CARVE as a subject of the runner: one question at a time."""

    def __init__(self, lmm: LMM, options: dict[str, Any]) -> None:
        self.lmm, self.options = lmm, options

    def fingerprint(self) -> dict[str, Any]:
        return {**self.lmm.fingerprint(), "carve": self.options}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        answers = (carve(self.lmm, asked.images[0], asked.sample.prompt, **self.options).answer for asked in batch)
        return [{"text": answer} for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["tune", "measure", "table"])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_intermixed_args()
    {"tune": tune, "measure": measure, "table": table}[options.what](options.out, options.methods or list(GRIDS))


def tune(out: Path, methods: Sequence[str]) -> None:
    """Write chosen/METHOD.json: the setting with the best accuracy on the calibration scenes."""
    scenes, lmm = scenes_of(out / "calibration", *CALIBRATION), load_lmm("vislm-tiny")
    for method in methods:
        tried = {}
        for options in GRIDS[method]:
            spec = spec_of(method, options, artefact(out, method, lmm))
            results = answered(lmm, scenes / "scenes", scenes / "runs" / name_of(spec), spec, "", "pope")
            tried[spec] = results["metrics"]["mean"]
            print(spec, tried[spec], flush=True)
        best = max(tried, key=lambda spec: tried[spec]["accuracy"])
        (out / "chosen").mkdir(exist_ok=True)
        text = json.dumps({"chosen": best, "tried": tried}, indent=1)
        (out / "chosen" / f"{method}.json").write_text(text, encoding="utf-8")


def measure(out: Path, methods: Sequence[str]) -> None:
    """Run POPE and CHAIR with the chosen settings and without any, on the test scenes."""
    scenes, lmm = scenes_of(out / "test", *TEST), load_lmm("vislm-tiny")
    for method in ["", *methods]:
        spec = method and chosen(out, method)
        for budget in BUDGETS:
            for benchmark in ("pope", "chair"):
                if method != "carve" or benchmark == "pope":
                    folder = scenes / "runs" / name_of(budget) / (method or "greedy") / benchmark
                    try:
                        results = answered(lmm, scenes / "scenes", folder, spec, budget, benchmark)
                    except PlanConflict as refusal:
                        print(f"left out: {refusal}", flush=True)
                    else:
                        print(budget, spec, benchmark, f"{results['seconds']:.0f} s", flush=True)


def table(out: Path, methods: Sequence[str]) -> None:
    """Print one table per budget, and what each method did."""
    for budget in BUDGETS:
        folder = out / "test" / "runs" / name_of(budget)
        found = ["", *(m for m in methods if (folder / m / "pope" / "results.json").is_file())]
        print(f"\n### {budget or 'All tokens'}\n")
        print(markdown_table([row(folder, m, chosen(out, m) if m else "greedy") for m in found]))


def row(folder: Path, method: str, setting: str) -> dict[str, Any]:
    """Return a method's row: figures, with differences to greedy decoding behind them."""
    pope, greedy = read_run(folder / (method or "greedy") / "pope"), read_run(folder / "greedy" / "pope")
    found: dict[str, Any] = {"method": f"`{re.sub('[^,:]*=[^,]*json', 'FILE', setting)}`"}
    for split in ("random", "popular", "adversarial"):
        found[split] = f"{pope.results['metrics'][split]['accuracy']:.3f}"
    against = {c.figure.name: c for c in compare(pope, greedy) if c.part == "all"} if method else {}
    accuracy = next(f for f in pope.figures if f.name == "accuracy")
    found["accuracy"] = str(figure_interval(pope, accuracy))
    found["difference"] = signed(against.get("accuracy"))
    mean = pope.results["metrics"]["mean"]
    found["yes"] = f"{mean['yes_ratio']:.3f}"
    without = f" without {mean['n_without_margin']} answers" if "n_without_margin" in mean else ""
    found["AUROC"] = f"{mean['auroc']:.4f}{without}" if "auroc" in mean else ""
    found["its difference"] = signed(against.get("auroc"), 4)
    captions = folder / (method or "greedy") / "chair"
    if (captions / "results.json").is_file():
        chair = read_run(captions)
        m = chair.results["metrics"]
        found |= {"CHAIR_i": f"{m['CHAIR_i']:.3f}", "CHAIR_s": f"{m['CHAIR_s']:.3f}", "recall": f"{m['Recall']:.3f}"}
        found["length"] = f"{m['Length']:.1f}"
        said = {c.figure.name: c for c in compare(chair, read_run(folder / "greedy" / "chair"))} if method else {}
        found["CHAIR_i difference"] = signed(said.get("CHAIR_i"))
        found["effect"] = str(effect(against, said)) if method else ""
    else:
        found["effect"] = str(effect(against, {}))
    return found


def signed(found: Comparison | None, digits: int = 3) -> str:
    if found is None:
        return ""
    d = found.difference
    return f"{d.value:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"


def scenes_of(place: Path, count: int, seed: int) -> Path:
    if not (place / "scenes" / "instances.json").is_file():
        write_scenes(place / "scenes", count, seed)
    return place


def artefact(out: Path, method: str, lmm: LMM) -> str:
    """Make a method's offline file unless it is there; return the option that names it."""
    if method not in ARTEFACTS:
        return ""
    option, settings = ARTEFACTS[method]
    path = out / f"{settings.what}.json"
    if not path.is_file():
        samples = load_samples("scenes", 100, 0, "", captions=settings.what in ("sinks", "ad_hh"))
        calibrate_heads(lmm, samples, settings, path, vocabulary_of(CATEGORIES))
    return f"{option}={path}"


def spec_of(method: str, *options: str) -> str:
    text = ",".join(filter(None, (*options, EXTRA.get(method, ""))))
    return f"{method}:{text}" if text else method


def chosen(out: Path, method: str) -> str:
    return json.loads((out / "chosen" / f"{method}.json").read_text(encoding="utf-8"))["chosen"]


def name_of(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", re.sub(r"=[^,\s]*/", "=", spec)) or "full"


def answered(lmm: LMM, data: Path, out: Path, spec: str, budget: str, benchmark: str) -> dict[str, Any]:
    """Run a benchmark with a head method and a pruner."""
    pruning = [registry.build("pruning", budget)] if budget else []
    if spec.startswith("carve"):
        options = vars(registry.build("heads", spec))
        with lmm.using(*pruning):
            return run(load_benchmark(benchmark, data), Carving(lmm, options), out, batch_size=16)
    with lmm.using(*pruning, *([registry.build("heads", spec)] if spec else [])):
        one = spec.startswith("opera")  # it searches one sample at a time
        return run(load_benchmark(benchmark, data), lmm, out, batch_size=1 if one else 128)


if __name__ == "__main__":
    main()
