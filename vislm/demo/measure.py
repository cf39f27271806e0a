"""What every setting does to answers, benchmarks, sizes and times on the embedded model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislm.data.scene_types import Scene
from vislm.data.scenes import write_scenes
from vislm.demo.questions import ask_about
from vislm.demo.settings import Setting
from vislm.demo.timing import interleaved, threads
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.protocol import Benchmark
from vislm.eval.running.runner import run
from vislm.lmm.model import LMM
from vislm.lmm.run import Run
from vislm.report.units import percent_text

HELD_OUT = 60221
"""Seed of the benchmark scenes; no training and no calibration used it."""
TIMED_BATCH, ROUNDS = 16, 7
Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """One setting's figures."""

    setting: Setting
    right: int
    asked: int
    pope: dict[str, Any]
    """Metrics of POPE's adversarial split."""
    chair: dict[str, Any]
    timed: Run
    """A prefill of a batch, with median times."""
    saving: float | None
    """Share of the theoretical saving that shows in the time of tower and prefill."""

    @property
    def megaflops(self) -> float:
        """FLOPs of tower and prefill for one sample, in millions."""
        return (self.timed.flops["tower"] + self.timed.flops["prefill"]) / self.timed.batch / 1e6

    @property
    def row(self) -> dict[str, str | int | float | None]:
        """The setting's row in the table."""
        return {
            "setting": self.setting.label,
            "tokens": self.timed.visual_tokens_kept[0],
            "right": f"{self.right}/{self.asked}",
            "POPE adv. acc.": round(self.pope["accuracy"], 3),
            "AUROC": round(self.pope["auroc"], 3),
            "yes": f"{self.pope['yes_ratio']:.2f}",
            "CHAIR_i": round(self.chair["CHAIR_i"], 3),
            "recall": round(self.chair["Recall"], 3),
            "MFLOP": f"{self.megaflops:.0f}",
            "KV KiB": f"{self.timed.kv_bytes / self.timed.batch / 1024:.0f}",
            "tower ms": f"{self.timed.seconds['tower'] * 1e3:.1f}",
            "prefill ms": f"{self.timed.seconds['prefill'] * 1e3:.1f}",
            "saving realised": percent_text(self.saving),
        }


def measure(
    lmm: LMM, settings: list[Setting], scenes: list[Scene], held_out: int, report: Report
) -> tuple[list[Outcome], dict[str, Any]]:
    """Return one outcome per setting, and POPE's context-only oracle on the adversarial split.

    Args:
        lmm: the embedded model.
        settings: the first one is the untouched model that savings are compared with.
        scenes: scenes to ask all questions about.
        held_out: number of scenes for POPE and CHAIR.
        report: gets a line per setting.
    """
    outcomes, oracle = [], {}
    # so small a model gains nothing from more threads, and loses much where another program takes a core
    with tempfile.TemporaryDirectory() as scratch, threads(1):
        times = _times(lmm, settings, scenes)
        folder = write_scenes(Path(scratch) / "scenes", held_out, HELD_OUT)
        pope, chair = load_benchmark("pope", folder), load_benchmark("chair", folder)
        for number, (setting, timed) in enumerate(zip(settings, times, strict=True)):
            with lmm.using(*setting.interventions):
                replies = [reply for scene in ask_about(lmm, scenes) for reply in scene]
                yes_no = _metrics(pope, lmm, Path(scratch) / f"{number}-pope")
                captions = _metrics(chair, lmm, Path(scratch) / f"{number}-chair")
            saving = None if number == 0 else timed.realised_saving(times[0])
            right = sum(reply.right for reply in replies)
            outcomes.append(Outcome(setting, right, len(replies), yes_no["adversarial"], captions, timed, saving))
            oracle = yes_no["oracles"]["adversarial"]["context_only"]
            report(f"   {number + 1:2d} of {len(settings)}  {setting.label:<18} {right} of {len(replies)} right")
    return outcomes, oracle


def _metrics(benchmark: Benchmark, lmm: LMM, out: Path) -> dict[str, Any]:
    return run(benchmark, lmm, out, batch_size=64)["metrics"]


def _times(lmm: LMM, settings: list[Setting], scenes: list[Scene]) -> list[Run]:
    images = [scenes[i % len(scenes)].image for i in range(TIMED_BATCH)]

    def call(setting: Setting) -> Run:
        with lmm.using(*setting.interventions):
            lmm.ask_many(images, ["is there a dog in the image ?"] * TIMED_BATCH, max_new_tokens=1)
        assert lmm.last_run is not None
        return lmm.last_run

    return interleaved([lambda s=setting: call(s) for setting in settings], ROUNDS)
