"""The training loop: short runs that learn, stop, continue bit for bit, and refuse what they cannot continue."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vislm.errors import CheckpointError, TrainingError
from vislm.training.tiny import checkpoint, development, train
from vislm.training.tiny.stages import RECIPE, Stage, recipe

SHORT = tuple(replace(s, steps=2, batch=2, warmup=1, mixture=replace(s.mixture, easy_vqa=0.0)) for s in RECIPE)
"""Two steps of two images a stage, without easy-vqa."""


class Stopped(BaseException):
    """Stands for a kill: nothing of the training code runs after it."""


def _shorten(patch: pytest.MonkeyPatch, stages: tuple[Stage, ...] = SHORT) -> None:
    patch.setattr(train, "recipe", lambda seed, scale: stages)
    patch.setattr(train, "SAVE_EVERY", 1)
    patch.setattr(development, "SCENES", 4)
    patch.setattr(development, "co_occurrence", lambda scenes: np.ones((16, 16), dtype=np.int64))


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _shorten(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        train.train_tiny(out, report=lambda line: None)
    return out


def _stop_after(lines: int, act: Callable[[], None]) -> Callable[[str], None]:
    seen: list[str] = []

    def report(line: str) -> None:
        if line.startswith("stage="):
            seen.append(line)
            if len(seen) == lines:
                act()

    return report


def _kill() -> None:
    raise Stopped


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_passes_through_all_stages(whole: Path) -> None:
    rows = _rows(whole)
    assert [(r["stage"], r["step"]) for r in rows] == [(s.name, k) for s in SHORT for k in (1, 2)]
    assert {"category", "colour", "present"} <= set(rows[0])
    measured = {"flat_auroc", "adversarial_auroc", "adversarial_accuracy", "yes_share", "count", "colour", "position"}
    assert measured <= set(rows[-1])
    assert {p.name for p in (whole / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 2, 4, 5, 6, 8, 10])
def test_a_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path, lines: int) -> None:
    """Killed after this many of the ten steps, before the checkpoint: at the start, at each stage's end, in between."""
    with pytest.raises(Stopped):
        train.train_tiny(tmp_path, report=_stop_after(lines, _kill))
    train.train_tiny(tmp_path, report=lambda line: None)
    for name in (checkpoint.NAME, "model/model.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_leaves(whole: Path, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as error:
        train.train_tiny(tmp_path, report=_stop_after(3, lambda: os.kill(os.getpid(), number)))
    assert error.value.code
    assert signal.getsignal(number) is before
    lines: list[str] = []
    train.train_tiny(tmp_path, report=lines.append)
    assert lines[0] == "resuming at A1 step 1"
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_another_seed_gives_another_model(whole: Path, tmp_path: Path) -> None:
    train.train_tiny(tmp_path, seed=1, report=lambda line: None)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, whole))
    differing = [key for key in ours if ours[key].ndim > 1 and not torch.equal(ours[key], theirs[key])]
    assert len(differing) == sum(tensor.ndim > 1 for tensor in ours.values())


def test_runs_that_cannot_be_continued_are_refused(whole: Path, tmp_path: Path) -> None:
    tmp_path.joinpath(checkpoint.NAME).write_bytes((whole / checkpoint.NAME).read_bytes())
    with pytest.raises(CheckpointError, match="seed"):
        train.train_tiny(tmp_path, seed=3)
    tmp_path.joinpath(checkpoint.NAME).write_bytes((whole / checkpoint.NAME).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train.train_tiny(tmp_path)
    save_file({"model.x": torch.zeros(1)}, tmp_path / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train.train_tiny(tmp_path)


@pytest.mark.slow
def test_resume_false_starts_anew(whole: Path, tmp_path: Path) -> None:
    tmp_path.joinpath(checkpoint.NAME).write_bytes(b"something else")
    train.train_tiny(tmp_path, resume=False, report=lambda line: None)
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = train.Trainer(0, SHORT)
    trainer.enter(SHORT[0])
    bias = trainer.model.model.multi_modal_projector.linear_1.bias
    with torch.no_grad():
        bias[0] = float("nan")
    weight = trainer.model.model.multi_modal_projector.linear_2.weight.clone()
    with pytest.raises(TrainingError, match="A0 step 0"):
        trainer.train_step()
    assert torch.equal(trainer.model.model.multi_modal_projector.linear_2.weight, weight)


def test_the_tower_learns_first_and_is_frozen_afterwards() -> None:
    trainer = train.Trainer(0, SHORT)
    inner = trainer.model.model
    for stage in SHORT:
        trainer.enter(stage)
        first = stage.name.startswith("A")
        assert all(p.requires_grad == first for p in inner.vision_tower.parameters())
        assert all(p.requires_grad != first for p in inner.language_model.parameters())
        assert all(p.requires_grad for p in inner.multi_modal_projector.parameters())


def test_a_few_steps_lower_the_loss() -> None:
    (stage,) = (replace(s, steps=12, batch=8, warmup=2) for s in RECIPE[:1])
    trainer = train.Trainer(0, (stage,))
    trainer.enter(stage)
    losses = [trainer.train_step()[0] for _ in range(12)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_learning_rates() -> None:
    stages = {s.name: s for s in RECIPE}
    assert [s.steps for s in RECIPE[:3]] == [1049, 531, 600]
    constant = stages["B1"]
    assert constant.lr(0) == pytest.approx(1e-3 / 40)
    assert constant.lr(39) == constant.lr(40) == constant.lr(599) == 1e-3
    for stage in RECIPE:
        rates = [stage.lr(k) for k in range(stage.steps)]
        assert max(rates) == pytest.approx(stage.peak_lr, rel=1e-3)
        if stage.decays:
            assert rates[stage.warmup :] == sorted(rates[stage.warmup :], reverse=True)
            assert rates[-1] == pytest.approx(0.03 * stage.peak_lr, rel=0.05)


def test_recipes_scale_and_have_their_own_streams() -> None:
    assert recipe() == RECIPE
    assert all(s.steps >= 2 and s.warmup >= 1 for s in recipe(0, 0.001))
    seeds = [{s.stream for s in recipe(seed)} for seed in range(3)]
    assert not seeds[0] & seeds[1]
    assert not seeds[1] & seeds[2]
