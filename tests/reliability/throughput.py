"""What the runner costs beside the model, and how long scoring takes.

python throughput.py
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vislm.eval.benchmarks import load_benchmark
from vislm.eval.captions.chair import Chair
from vislm.eval.captions.vocabulary import coco_vocabulary
from vislm.eval.questions.pope import Pope
from vislm.eval.questions.pope_build import build
from vislm.eval.running.runner import run, summary

GOLDEN = Path(__file__).parents[1] / "golden" / "chair" / "llava15_greedy_first150.json"


class Timed:
    """A model, and the seconds that its calls take."""

    def __init__(self, lmm: Any) -> None:
        self._lmm, self.seconds = lmm, 0.0

    def fingerprint(self) -> dict[str, Any]:
        return self._lmm.fingerprint()

    def ask_many(self, *arguments: Any, **options: Any) -> Sequence[Any]:
        began = time.perf_counter()
        answers = self._lmm.ask_many(*arguments, **options)
        self.seconds += time.perf_counter() - began
        return answers


def overhead(scenes: int = 120, batch_size: int = 32, repeats: int = 3) -> dict[str, Any]:
    """Return the seconds of POPE runs on the embedded model, those inside the model, and the median share of the rest.

    The rest is everything: decoding, rows, syncing, scoring, the oracles over scenes, results.
    """
    from vislm.data.scenes import write_scenes
    from vislm.lmm.model import load_lmm

    shares, timed = [], Timed(load_lmm())
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_scenes(Path(scratch) / "scenes", scenes, 7)
        run(load_benchmark("pope", folder), timed, Path(scratch) / "warm", limit=64, batch_size=batch_size)
        for number in range(repeats):
            benchmark = load_benchmark("pope", folder)  # anew: what it computes once counts for each run
            timed.seconds, began = 0.0, time.perf_counter()
            run(benchmark, timed, Path(scratch) / f"{number}", batch_size=batch_size)
            total = time.perf_counter() - began
            shares.append((total / timed.seconds - 1, total, timed.seconds))
    share, total, inside = sorted(shares)[len(shares) // 2]
    return {
        "embedded model, POPE questions": len(benchmark.samples),
        "seconds": round(total, 3),
        "seconds inside the model": round(inside, 3),
        "all else, % of the model's time (median of 3 runs)": round(100 * share, 2),
    }


def scoring(answers: int = 3000, captions: int = 500) -> dict[str, float]:
    """Return the seconds that metrics, verdicts, groups and standard errors of POPE and CHAIR take."""
    vocabulary, rng = coco_vocabulary(), random.Random(0)
    objects = {f"{i}.jpg": rng.sample(vocabulary.objects[1:], 5) for i in range(answers // 6)}
    questions = build(objects, "adversarial", rng)
    paths = {image: Path(image) for image in objects}
    yes_no = Pope(questions, paths)
    replies = {
        s.id: {"id": s.id, "text": rng.choice(["Yes", "No."]), "candidates": _logits(rng)} for s in yes_no.samples
    }
    texts = [c["caption"] for c in json.loads(GOLDEN.read_text())["captions"]]
    described = Chair(
        {str(i): Path(str(i)) for i in range(captions)}, {str(i): {"person"} for i in range(captions)}, vocabulary
    )
    rows = {s.id: {"id": s.id, "text": texts[i % len(texts)]} for i, s in enumerate(described.samples)}
    began = time.perf_counter()
    summary(yes_no, replies)
    between = time.perf_counter()
    summary(described, rows)
    ended = time.perf_counter()
    return {
        "POPE answers": len(replies),
        "POPE seconds": round(between - began, 3),
        "CHAIR captions": len(rows),
        "CHAIR seconds": round(ended - between, 3),
    }


def _logits(rng: random.Random) -> dict[str, float]:
    return {"yes": rng.gauss(0, 1), "no": rng.gauss(0, 1)}


if __name__ == "__main__":
    print(json.dumps({"scoring": scoring(), "overhead": overhead()}, indent=1))
