"""Searching on the embedded model: kill and resume, fingerprints, schedules that load, honest tables."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vislm import attach, registry
from vislm.cli import app
from vislm.errors import RunFolderError, UnknownName, UsageError
from vislm.lmm.interventions import LanguageStage
from vislm.lmm.model import load_lmm
from vislm.tuning import objective, study
from vislm.tuning.budget import Budget
from vislm.tuning.folder import study_folder
from vislm.tuning.objective import Calibration
from vislm.tuning.plot import pareto_front
from vislm.tuning.run import Settings, tune_pruning
from vislm.tuning.samples import load_samples
from vislm.tuning.space import Interval, Method
from vislm.tuning.study import tune


@pytest.fixture(scope="module")
def lmm():
    return load_lmm("vislm-tiny")


@pytest.fixture(scope="module")
def samples():
    return load_samples("scenes", 2, 0)


@pytest.fixture(scope="module")
def calibration(lmm, samples):
    return Calibration(lmm, samples)


def settings(**changes) -> Settings:
    return replace(Settings("flowcut:where=tower", ["0.5"], trials=4, sampler="tpe"), **changes)


class Killed(BaseException):
    """Stands for the signal that ends a process."""


# -- objective -------------------------------------------------------------------------------------------------------
def test_the_objective_is_that_of_hidden_states_by_hand(lmm, samples, calibration) -> None:
    method = registry.build("pruning", "fastv:keep=0.25,layer=1")
    cosines = []
    for sample in samples:
        inputs = lmm.prepare([sample.image], [sample.question])
        states = []
        for methods in ((), (method,)):
            with attach(lmm.model, *methods), torch.no_grad():
                out = lmm.model(**inputs, output_hidden_states=True)
            states.append(out.hidden_states[-1][0, -1])
        cosines.append(torch.nn.functional.cosine_similarity(*states, dim=0).item())
    evaluation = calibration.evaluate(method)
    assert evaluation.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert evaluation.discrepancy == pytest.approx(1.0 - evaluation.cosine)
    assert evaluation.kl > 0.0
    # layer 0 of four has all 64 tokens, the others 16
    assert evaluation.cost.tokens == pytest.approx((1.0 + 3 * 0.25) / 4)
    assert evaluation.cost.flops < 1.0


def test_keeping_everything_changes_nothing(calibration) -> None:
    evaluation = calibration.evaluate(registry.build("pruning", "fastv:keep=1.0"))
    assert evaluation.discrepancy == pytest.approx(0.0, abs=1e-6)
    assert evaluation.kl == pytest.approx(0.0, abs=1e-6)
    assert calibration.full_cost.tokens == calibration.full_cost.flops == 1.0


def test_the_answer_distribution_may_count_too(lmm, samples, calibration) -> None:
    method = registry.build("pruning", "fastv:keep=0.1,layer=1")
    weighted = Calibration(lmm, samples, kl_weight=2.0).evaluate(method)
    assert weighted.discrepancy == pytest.approx(1.0 - weighted.cosine + 2.0 * weighted.kl)


def test_not_a_number_counts_as_no_likeness() -> None:
    state, broken = torch.ones(4), torch.full((4,), torch.nan)
    assert objective._cosine(state, broken) == 0.0
    assert objective._kl(state.log_softmax(-1), broken) == pytest.approx(math.log(4))


# -- search ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_killed_study_goes_on_as_if_nothing_had_happened(sampler, calibration, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study, "STARTUP", 2)
    method, budget = Method.of("flowcut:where=tower"), Budget.parse("0.5")

    def kill(tried) -> None:
        if tried.number == 3:
            raise Killed

    whole = tune(method, calibration, budget, tmp_path / "a.db", trials=5, sampler=sampler)
    with pytest.raises(Killed):
        tune(method, calibration, budget, tmp_path / "b.db", trials=5, sampler=sampler, done=kill)
    seen: list[int | None] = []
    resumed = tune(
        method, calibration, budget, tmp_path / "b.db", trials=5, sampler=sampler, done=lambda t: seen.append(t.number)
    )
    assert seen == list(range(5))
    assert [t.options for t in resumed.trials] == [t.options for t in whole.trials]
    assert [t.evaluation for t in resumed.trials] == [t.evaluation for t in whole.trials]


def test_a_trial_that_was_cut_short_is_done_again(calibration, tmp_path, monkeypatch) -> None:
    method, budget = Method.of("flowcut:where=tower"), Budget.parse("0.5")
    whole = tune(method, calibration, budget, tmp_path / "a.db", trials=3, sampler="tpe")
    real, calls = Calibration.evaluate, [0]

    def evaluate(self, method):
        calls[0] += 1
        if calls[0] == 3:  # the defaults, trial 0, then in the middle of trial 1
            raise Killed
        return real(self, method)

    monkeypatch.setattr(Calibration, "evaluate", evaluate)
    with pytest.raises(Killed):
        tune(method, calibration, budget, tmp_path / "b.db", trials=3, sampler="tpe")
    resumed = tune(method, calibration, budget, tmp_path / "b.db", trials=3, sampler="tpe")
    assert [t.options for t in resumed.trials] == [t.options for t in whole.trials]
    assert [t.number for t in resumed.trials] == [0, 1, 2]


def test_trials_over_the_budget_and_refused_ones_do_not_win(calibration, tmp_path) -> None:
    result = tune(
        Method.of("fastv", ["layer=1..4"]),
        calibration,
        Budget.parse("0.4"),
        tmp_path / "a.db",
        trials=14,
        sampler="tpe",
    )
    by_layer = {t.options["layer"]: t for t in result.trials}
    assert set(by_layer) == {1, 2, 3, 4}
    assert by_layer[1].feasible
    assert by_layer[1].evaluation.cost.tokens <= 0.4 * 1.01
    assert not by_layer[2].feasible  # half of the layers see everything
    assert by_layer[2].evaluation is not None
    assert by_layer[4].evaluation is None
    assert by_layer[4].reason
    assert result.best.options["layer"] == 1
    assert by_layer[3].evaluation.discrepancy < result.best.evaluation.discrepancy


def test_a_discrete_point_is_evaluated_once(calibration, tmp_path, monkeypatch) -> None:
    calls = []
    real = Calibration.evaluate
    monkeypatch.setattr(Calibration, "evaluate", lambda self, method: calls.append(method) or real(self, method))
    method = Method.of("fastv:keep=0.5", ["layer=1..2"])
    result = tune(method, calibration, Budget.parse("0.9"), tmp_path / "a.db", trials=6, sampler="tpe")
    assert len(calls) == 3  # the defaults and two points
    assert len(result.trials) == 6


@pytest.mark.slow
def test_vflowopt_within_flops(calibration, tmp_path) -> None:
    result = tune(Method.of("vflowopt"), calibration, Budget.parse("flops=0.7"), tmp_path / "a.db", trials=6)
    assert set(result.space) == {"R1", "R2", "t", "a", "alpha"}
    assert result.best is not None
    assert result.best.evaluation.cost.flops <= 0.7 * 1.01


def test_another_space_is_refused(calibration, tmp_path) -> None:
    database, budget = tmp_path / "a.db", Budget.parse("0.5")
    tune(Method.of("fastv", ["layer=1..2"]), calibration, budget, database, trials=1, sampler="tpe")
    with pytest.raises(RunFolderError, match="is now to search"):
        tune(Method.of("fastv", ["layer=1..3"]), calibration, budget, database, trials=2, sampler="tpe")


# -- the folder ------------------------------------------------------------------------------------------------------
def test_what_a_study_leaves_behind(lmm, samples, tmp_path) -> None:
    results, paths = tune_pruning(lmm, samples, settings(budgets=["0.5", "tokens=16"], trials=2), tmp_path)
    assert [p.name for p in paths] == [
        "schedule-tokens-0.5.yaml",
        "schedule-tokens-16.yaml",
        "trials.csv",
        "trials.json",
        "pareto.png",
    ]
    for result, path in zip(results, paths[:2], strict=True):
        best, method = result.best, registry.build("pruning", str(path))
        assert method == replace(registry.build("pruning", "flowcut:where=tower"), **best.options)
        assert f"Discrepancy {best.evaluation.discrepancy:.4g}" in path.read_text()
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3
    assert [row["trial"] for row in rows[:3]] == ["defaults", "0", "1"]
    content = json.loads((tmp_path / "trials.json").read_text())
    assert content["samples"] == 2
    assert content["spaces"]["tokens=0.5"] == {"history": "0..0.9", "period": "1..6"}
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.size[0] > 500


def test_a_study_is_continued_and_not_mixed(lmm, samples, tmp_path) -> None:
    first, _ = tune_pruning(lmm, samples, settings(trials=1), tmp_path)
    more, _ = tune_pruning(lmm, samples, settings(trials=2, budgets=["0.5", "0.25"]), tmp_path)
    assert [t.options for t in more[0].trials[:1]] == [t.options for t in first[0].trials]
    assert [len(r.trials) for r in more] == [2, 2]
    changes = {"seed": 1, "kl_weight": 0.5, "method": "flowcut:where=language", "sampler": "gp"}
    for name, value in changes.items():
        with pytest.raises(RunFolderError, match="belongs to another study"):
            tune_pruning(lmm, samples, settings(**{name: value}), tmp_path)
    with pytest.raises(RunFolderError, match="number of samples: 2 there, 1 now"):
        tune_pruning(lmm, samples[:1], settings(), tmp_path)


def test_one_process_at_a_time(tmp_path) -> None:
    with (
        study_folder(tmp_path, {"a": 1}),
        pytest.raises(RunFolderError, match="another process"),
        study_folder(tmp_path, {"a": 1}),
    ):
        pass
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RunFolderError, match="not valid JSON"), study_folder(tmp_path, {"a": 1}):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"sampler": "gpp"}, "did you mean 'gp'"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"budgets": []}, "no budget"),
        ({"budgets": ["2.0"]}, "expected a share"),
        ({"seed": -1}, "seed=-1"),
        ({"method": "flowcutt"}, "did you mean 'flowcut'"),
    ],
)
def test_impossible_settings(changes, message, lmm, samples, tmp_path) -> None:
    with pytest.raises((UsageError, UnknownName), match=message):
        tune_pruning(lmm, samples, settings(**changes), tmp_path)


def test_pareto_front() -> None:
    points = [(0.5, 0.1), (0.6, 0.2), (0.4, 0.3), (0.7, 0.05), (0.5, 0.2), (0.4, 0.35)]
    assert pareto_front(points) == [(0.4, 0.3), (0.5, 0.1), (0.7, 0.05)]


# -- any method ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gradual:
    """A method of a user: drops the later tokens before a layer; has no keep."""

    share: float = field(default=0.5, metadata={"range": (0.1, 1.0)})
    name = "gradual"

    def plan(self, adapter):
        return [LanguageStage(1, None, lambda call: None, self._select)]

    def _select(self, view):
        return (view.image_of < 0) | (view.token_of < self.share * 64)


def test_a_method_without_keep_meets_the_budget_by_its_own_options(calibration, tmp_path) -> None:
    method = Method(Gradual(), frozenset(), {})
    assert not method.solves_keep
    result = tune(method, calibration, Budget.parse("0.6"), tmp_path / "a.db", trials=8, sampler="tpe")
    assert result.space == {"share": Interval(0.1, 1.0)}
    assert all(t.feasible == (t.evaluation.cost.tokens <= 0.606) for t in result.trials)
    assert {t.feasible for t in result.trials} == {True, False}
    assert result.best.feasible


@pytest.mark.slow
def test_the_command(tmp_path) -> None:
    arguments = ["tune-pruning", "--prune", "fastv", "--search", "layer=1..2", "--budget", "0.6", "--trials", "3"]
    arguments += ["--num-samples", "2", "--sampler", "tpe", "--out", str(tmp_path / "study")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tokens=0.6" in result.stdout
    assert "schedule-tokens-0.6.yaml" in result.stdout
    impossible = [*arguments[:-1], str(tmp_path / "other")]
    impossible[impossible.index("0.6")] = "0.01"
    result = CliRunner().invoke(app, impossible)
    assert "no trial stayed within tokens=0.01" in result.output
