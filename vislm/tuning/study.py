"""Searching: one optuna study per budget, all in one database, each trial on the disk as soon as it is done."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from vislm.errors import RunFolderError, UsageError
from vislm.tuning.budget import Budget, Cost, solve_keep
from vislm.tuning.objective import Calibration, Evaluation
from vislm.tuning.space import Method, Space

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

SamplerName = Literal["gp", "tpe"]
STARTUP = 10
"""Random trials before a sampler models anything."""
PROBES = 2
"""Samples on which ``keep`` is solved; the budget is checked on all."""
REFUSED = 1.0
"""Violation of a trial whose options the method refuses; its discrepancy counts as 1."""


@dataclass(frozen=True)
class Tried:
    """One trial of a study, or the method's defaults."""

    number: int | None
    """None for the defaults."""
    options: dict[str, Any]
    """The options that were searched or solved."""
    evaluation: Evaluation | None
    """None if the method refused them."""
    violation: float
    """By which share of it the budget was exceeded; 0 or less is feasible."""
    seconds: float
    reason: str = ""
    """Why it was refused."""

    @property
    def feasible(self) -> bool:
        """Whether it ran within the budget."""
        return self.evaluation is not None and self.violation <= 0.0


@dataclass(frozen=True)
class Result:
    """A study's trials for one budget."""

    budget: Budget
    space: Space
    trials: list[Tried]
    defaults: Tried
    options: dict[str, Any] = field(default_factory=dict)
    """What the user has fixed."""

    @property
    def best(self) -> Tried | None:
        """The feasible trial of the smallest discrepancy (the defaults count as one); None if there is none."""
        feasible = [(t.evaluation.discrepancy, t) for t in [self.defaults, *self.trials] if t.feasible and t.evaluation]
        return min(feasible, key=lambda pair: pair[0])[1] if feasible else None


def tune(
    method: Method,
    calibration: Calibration,
    budget: Budget,
    database: Path,
    *,
    trials: int,
    seed: int = 0,
    sampler: SamplerName = "gp",
    done: Callable[[Tried], None] = lambda tried: None,
) -> Result:
    """Search until the study of this budget has ``trials`` trials; those that are in the database count.

    Every trial is seeded by the seed and the number of trials before it, so that a killed study goes on as if nothing
    had happened.

    Args:
        method: from :meth:`Method.of`.
        calibration: model and samples.
        budget: upper bound of the cost.
        database: sqlite file; made if it is not there.
        trials: their total number.
        seed: of the sampler.
        sampler: "gp" (Gaussian process, expected improvement; needs scipy) or "tpe".
        done: called with every trial, those from the database included.

    Raises:
        UsageError: nothing to search, or optuna is not installed.
        RunFolderError: the database holds a study of this budget with another search space.
    """
    optuna = _optuna()
    share = budget.share(calibration.full_cost)
    space = method.space(share, calibration.layers)
    search = _Search(method, calibration, budget, share)
    with _quiet(optuna):
        study = optuna.create_study(
            storage=f"sqlite:///{database}", study_name=str(budget), load_if_exists=True, direction="minimize"
        )
        _check_space(study, space)
        defaults = _defaults(study, search)
        finished = _finished(study)
        trials_done = [_tried(trial, number) for number, trial in enumerate(finished)]
        known = {_key(trial.params): tried for trial, tried in zip(finished, trials_done, strict=True)}
        for tried in trials_done:
            done(tried)
        distributions = {name: values.distribution() for name, values in space.items()}
        for number in range(len(finished), trials):
            study.sampler = _sampler(optuna, sampler, seed * 100_003 + number)
            trial = study.ask(distributions)
            tried = known.get(_key(trial.params)) or search.run(number, dict(trial.params))
            known[_key(trial.params)] = tried = replace(tried, number=number)
            trial.set_user_attr("tried", _stored(tried))
            trial.set_constraint("budget", tried.violation)
            study.tell(trial, REFUSED if tried.evaluation is None else tried.evaluation.discrepancy)
            trials_done.append(tried)
            done(tried)
        fixed = {name: method.defaults[name] for name in sorted(method.given)}
        return Result(budget, space, trials_done, defaults, fixed)


@dataclass(frozen=True)
class _Search:
    method: Method
    calibration: Calibration
    budget: Budget
    share: float

    def run(self, number: int | None, options: dict[str, Any]) -> Tried:
        started = time.perf_counter()
        try:
            if self.method.solves_keep:
                keep = solve_keep(lambda keep: self._probe({**options, "keep": keep}), self.share)
                options = {**options, "keep": keep}
            evaluation = self.calibration.evaluate(self.method.build(options))
        except UsageError as error:
            return Tried(number, options, None, REFUSED, time.perf_counter() - started, str(error))
        violation = self.budget.violation(evaluation.cost)
        return Tried(number, options, evaluation, violation, time.perf_counter() - started)

    def _probe(self, options: dict[str, Any]) -> float:
        """Return the share of the full cost."""
        cost = self.calibration.cost(self.method.build(options), PROBES)
        return cost.flops if self.budget.kind == "flops" else cost.tokens


def _defaults(study: Study, search: _Search) -> Tried:
    """Return the method's defaults at this budget, evaluated once per study."""
    stored = study.user_attrs.get("defaults")
    if stored is None:
        stored = _stored(search.run(None, {}))
        study.set_user_attr("defaults", stored)
    return _loaded(None, stored)


def _check_space(study: Study, space: Space) -> None:
    shown = {name: str(values) for name, values in space.items()}
    old = study.user_attrs.get("space")
    if old is None:
        study.set_user_attr("space", shown)
    elif old != shown:
        raise RunFolderError(
            f"the study of {study.study_name} searched {old}, and is now to search {shown}; use another --out"
        )


def _finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that were completed; one that a kill cut short is done again."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def _key(options: dict[str, Any]) -> str:
    """Return a text that equal options share; a search in a discrete space comes back to the same point."""
    return json.dumps(options, sort_keys=True)


def _stored(tried: Tried) -> dict[str, Any]:
    figures = None if tried.evaluation is None else tried.evaluation.row()
    return {
        "options": tried.options,
        "figures": figures,
        "violation": tried.violation,
        "seconds": tried.seconds,
        "reason": tried.reason,
    }


def _tried(trial: FrozenTrial, number: int) -> Tried:
    return _loaded(number, trial.user_attrs["tried"])


def _loaded(number: int | None, stored: dict[str, Any]) -> Tried:
    figures, evaluation = stored["figures"], None
    if figures is not None:
        cost = Cost(figures["tokens"], figures["flops"], figures["average_tokens"])
        evaluation = Evaluation(figures["discrepancy"], figures["cosine"], figures["kl"], cost)
    return Tried(number, dict(stored["options"]), evaluation, stored["violation"], stored["seconds"], stored["reason"])


def _sampler(optuna: Any, name: SamplerName, seed: int) -> BaseSampler:
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, deterministic_objective=True)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError("tuning needs optuna and scipy: pip install 'vislm[tune]'") from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Silence optuna's lines for every trial and its notes on what is experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
