"""What the embedded model must be, on scenes that nothing has used: a model whose answers no oracle explains."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from vislm import FlowCut, RandomPruning, load_lmm
from vislm.data.scene_categories import THEMES, UNIVERSALS
from vislm.data.scenes import generate_scenes, write_scenes
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.captions import chair_scores as chair
from vislm.eval.running.runner import run
from vislm.heads.vhr import divergence
from vislm.lmm.interventions import HeadStage, TowerStage

pytestmark = pytest.mark.slow
SEED, SCENES = 424242, 400


@dataclass(frozen=True)
class ClsAttention:
    """Keep the patches with the most CLS attention in the layer before the one that is read."""

    keep: int
    name = "cls"

    def plan(self, adapter):
        from vislm.token_pruning.flowcut import cls_flow

        def select(view):
            best = view.signal.attention.argsort(dim=-1, descending=True)[:, : self.keep]
            return torch.zeros_like(view.signal.attention, dtype=torch.bool).scatter(1, best, True)

        return [TowerStage(adapter.read_layer - 1, cls_flow, select, positions="original")]


@dataclass(frozen=True)
class HalfOfTheHeads:
    """Scale the more (or the less) image-sensitive half of the heads of layers 1-3."""

    alpha: float
    top: bool
    name = "half"

    def plan(self, adapter):
        def scale(view):
            if view.phase == "prefill":
                vhd = divergence(view.image_output, view.text_only_output)
                chosen = vhd > vhd.median(-1, keepdim=True).values
                view.memory[view.layer] = chosen if self.top else ~chosen
            return torch.where(view.memory[view.layer], self.alpha, 1.0)

        return [HeadStage(frozenset({1, 2, 3}), scale, "image_only")]


@pytest.fixture(scope="module")
def lmm():
    return load_lmm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), SCENES, SEED)


@pytest.fixture(scope="module")
def score(lmm, folder, tmp_path_factory):
    """POPE metrics of a setting, each measured once."""
    seen = {}

    def measure(*methods, control="none"):
        key = (repr(methods), control)
        if key not in seen:
            with lmm.using(*methods):
                out = tmp_path_factory.mktemp("run")
                seen[key] = run(load_benchmark("pope", folder, control=control), lmm, out, batch_size=128)["metrics"]
        return seen[key]

    return measure


def test_pope(score) -> None:
    metrics = score()
    accuracy = [metrics[s]["accuracy"] for s in ("random", "popular", "adversarial")]
    assert accuracy[0] >= 0.92
    assert 0.82 <= accuracy[2] <= 0.93
    assert accuracy[0] >= accuracy[1] - 0.01
    assert accuracy[1] >= accuracy[2] - 0.01
    assert metrics["adversarial"]["auroc"] >= 0.94
    assert 0.54 <= metrics["adversarial"]["yes_ratio"] <= 0.62


def test_no_oracle_explains_the_answers(score) -> None:
    metrics = score()
    oracle = {s: metrics["oracles"][s]["context_only"]["best_accuracy"] for s in ("random", "adversarial")}
    assert metrics["adversarial"]["accuracy"] >= oracle["adversarial"] + 0.15
    assert metrics["random"]["accuracy"] >= oracle["random"] + 0.05


def test_a_grey_picture_leaves_nothing(score) -> None:
    metrics = score(control="grey")
    assert 0.45 <= metrics["adversarial"]["accuracy"] <= 0.60
    assert metrics["adversarial"]["auroc"] < 0.5


def test_captions(lmm, folder, tmp_path) -> None:
    benchmark = load_benchmark("chair", folder)
    results = run(benchmark, lmm, tmp_path, batch_size=128)
    assert 0.05 <= results["metrics"]["CHAIR_i"] <= 0.12
    assert results["metrics"]["Recall"] >= 0.80
    themes = {f"{i:06d}.png": s.theme for i, s in enumerate(generate_scenes(SCENES, SEED), start=1)}
    rows = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = []
    for row in map(json.loads, rows):
        scored = chair.score_caption(row["text"], benchmark.truth[row["id"]], benchmark.vocabulary)
        wrong += [n in THEMES[themes[row["id"]]][1] or n in UNIVERSALS for _, n in scored.hallucinated]
    assert sum(wrong) / len(wrong) >= 0.50


def test_pruning(score) -> None:
    full = score()["adversarial"]["accuracy"]
    assert score(ClsAttention(16))["adversarial"]["accuracy"] > full - 0.02
    random16 = score(RandomPruning(keep=16))["adversarial"]["accuracy"]
    assert random16 <= full - 0.05
    assert score(FlowCut(keep=16))["adversarial"]["accuracy"] >= random16 + 0.03
    few, random = score(ClsAttention(4)), score(RandomPruning(keep=4))
    assert few["adversarial"]["accuracy"] >= random["adversarial"]["accuracy"] + 0.15


def test_head_scaling(score) -> None:
    full = score()["adversarial"]
    top, bottom = score(HalfOfTheHeads(1.5, True))["adversarial"], score(HalfOfTheHeads(1.5, False))["adversarial"]
    assert top["yes_ratio"] < full["yes_ratio"] < bottom["yes_ratio"]
    assert abs(top["auroc"] - full["auroc"]) <= 0.01
    assert abs(bottom["auroc"] - full["auroc"]) <= 0.01


def test_skills(lmm) -> None:
    from vislm.data.turns import colour_turn, count_turn, position_turn, singletons

    scenes = list(generate_scenes(150, SEED))

    def share(make, names) -> float:
        asked = [(s, make(s, c)) for s in scenes for c in names(s)]
        answers = lmm.ask_many([s.image for s, _ in asked], [t.question for _, t in asked], max_new_tokens=6)
        return sum(t.answer == a.text for (_, t), a in zip(asked, answers, strict=True)) / len(asked)

    assert share(colour_turn, lambda s: s.present) >= 0.93
    assert share(position_turn, singletons) >= 0.90
    assert share(count_turn, lambda s: [*s.present, s.absent[0]]) >= 0.74


def test_the_file_is_small() -> None:
    from vislm.lmm.loading import EMBEDDED

    assert (EMBEDDED["vislm-tiny"] / "model.safetensors").stat().st_size < 3_500_000
