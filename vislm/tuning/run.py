"""One command: calibrate, search every budget, write what was found."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from vislm.errors import UnknownName, UsageError
from vislm.lmm.model import LMM
from vislm.tuning.budget import Budget
from vislm.tuning.folder import study_folder
from vislm.tuning.objective import Calibration
from vislm.tuning.results import Study, write_results
from vislm.tuning.samples import Sample
from vislm.tuning.space import Method
from vislm.tuning.study import Result, SamplerName, Tried, tune

DATABASE = "trials.db"


@dataclass(frozen=True)
class Settings:
    """What is searched and how."""

    method: str
    """As ``--prune`` takes it; options given here are fixed."""
    budgets: Sequence[str]
    """See :meth:`Budget.parse`."""
    trials: int = 50
    """Per budget."""
    seed: int = 0
    sampler: SamplerName = "gp"
    kl_weight: float = 0.0
    """Weight of the KL divergence of the first answer token in the discrepancy."""
    search: Sequence[str] = field(default_factory=tuple)
    """Ranges besides those that the method declares, such as ``t=0..10``."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no search can have."""
        if self.trials < 1:
            raise UsageError(f"trials={self.trials}: expected a whole number >= 1")
        if self.sampler not in get_args(SamplerName):
            raise UnknownName("sampler", self.sampler, get_args(SamplerName))
        if self.kl_weight < 0.0:
            raise UsageError(f"kl_weight={self.kl_weight}: expected a number >= 0")
        if not self.budgets:
            raise UsageError("no budget is given; give one, such as 0.25")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: expected a whole number >= 0")


def tune_pruning(
    lmm: LMM, samples: Sequence[Sample], settings: Settings, out: Path, *, progress: bool = False
) -> tuple[list[Result], list[Path]]:
    """Search schedules for every budget and write them; return the trials and the paths of what was written.

    A folder with trials of the same study is continued: ``trials`` is the number that there will be. Budgets may be
    added later.

    Args:
        lmm: the model.
        samples: calibration samples; their answers are not needed.
        settings: what is searched.
        out: folder of the study.
        progress: show a bar on a terminal.

    Raises:
        UsageError: settings that cannot be.
        RunFolderError: the folder belongs to another study or another process.
    """
    settings.check()
    method = Method.of(settings.method, settings.search)
    budgets = [Budget.parse(text) for text in settings.budgets]
    with study_folder(out, fingerprint(lmm, samples, settings, method)):
        calibration = Calibration(lmm, samples, settings.kl_weight)
        results = []
        for budget in budgets:
            with _bar(settings.trials, str(budget), progress) as done:
                results.append(
                    tune(
                        method,
                        calibration,
                        budget,
                        out / DATABASE,
                        trials=settings.trials,
                        seed=settings.seed,
                        sampler=settings.sampler,
                        done=done,
                    )
                )
        return results, write_results(results, Study(lmm.name, method.base.name, len(samples)), out)


def fingerprint(lmm: LMM, samples: Sequence[Sample], settings: Settings, method: Method) -> dict[str, Any]:
    """Return what determines the trials: model, method, samples, settings; not their number and not the budgets."""
    digest = hashlib.sha256("\n".join(sample.digest for sample in samples).encode()).hexdigest()
    return {
        **lmm.fingerprint(),
        "method": method.base.name,
        "options": {name: repr(value) for name, value in method.defaults.items()},
        "given": sorted(method.given),
        "search": {name: str(values) for name, values in method.wanted.items()},
        "samples": digest,
        "number of samples": len(samples),
        "seed": settings.seed,
        "sampler": settings.sampler,
        "kl_weight": settings.kl_weight,
        "vislm": version("vislm"),
    }


@contextlib.contextmanager
def _bar(trials: int, name: str, wanted: bool) -> Iterator[Callable[[Tried], None]]:
    """A progress bar on a terminal that shows the best discrepancy so far; silence elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal), transient=True) as bar:
        task, best = bar.add_task(name, total=trials, best=""), float("inf")

        def done(tried: Tried) -> None:
            nonlocal best
            if tried.feasible and tried.evaluation:
                best = min(best, tried.evaluation.discrepancy)
            bar.update(task, advance=1, best="" if best == float("inf") else f"best {best:.4g}")

        yield done
