"""Which turns a training image gets, their weights, and the labels of stage A."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import COLOURS
from vislm.data.scenes import generate_scenes
from vislm.data.turns import singletons
from vislm.errors import UsageError
from vislm.training.tiny.losses import dense_labels
from vislm.training.tiny.samples import EasyVqa, all_presence, dense, first_phase, mixed

SCENES = list(generate_scenes(200, 6))


def _kinds(turns) -> Counter[str]:
    return Counter(w.turn.kind for w in turns)


def test_all_presence_weighs_yes_and_no_the_same() -> None:
    for scene in SCENES[:20]:
        turns = all_presence(scene)
        assert sorted(w.turn.category or "" for w in turns) == sorted(CATEGORIES)
        for answer in ("yes .", "no ."):
            assert sum(w.first for w in turns if w.turn.answer == answer) == pytest.approx(8)
        assert all(w.later is None for w in turns)


def test_dense_asks_about_everything_present() -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES[:40]:
        for caption in (False, True):
            turns = dense(scene, rng, caption)
            n = len(scene.present)
            expected = {
                "colour": n,
                "count": n + 1,
                "position": len(singletons(scene)),
                "presence": 2,
                "caption": caption,
            }
            assert _kinds(turns) == Counter({kind: k for kind, k in expected.items() if k})
            answers = Counter(w.turn.answer for w in turns)
            assert (answers["yes ."], answers["no ."], answers["zero ."]) == (1, 1, 1)


def test_mixtures_have_few_absent_categories() -> None:
    rng = np.random.default_rng(0)
    zeros = 0
    for scene in SCENES:
        turns = mixed(scene, rng, 4, 1)
        answers = Counter(w.turn.answer for w in turns if w.turn.kind == "presence")
        assert answers == Counter({"yes .": min(4, len(scene.present)), "no .": 1})
        kinds = _kinds(turns)
        assert (kinds["count"], kinds["caption"]) == (2, 1)
        assert kinds["colour"] == min(2, len(scene.present))
        assert kinds["position"] == min(2, len(singletons(scene)))
        zeros += sum(w.turn.answer == "zero ." for w in turns)
        assert {(w.first, w.later) for w in turns if w.turn.kind == "caption"} == {(0.5, 0.5)}
        assert {(w.first, w.later) for w in turns if w.turn.kind != "caption"} == {(1.0, 0.2)}
    assert zeros / (2 * len(SCENES)) == pytest.approx(0.15, abs=0.06)


def test_first_phase_mixes_three_kinds_of_turn_sets() -> None:
    rng = np.random.default_rng(1)
    kinds = [_kinds(first_phase(scene, rng)) for scene in SCENES]
    assert np.mean([k["presence"] == 16 for k in kinds]) == pytest.approx(0.4, abs=0.12)
    assert np.mean([k["caption"] == 1 for k in kinds]) == pytest.approx(0.3, abs=0.12)


def test_patches_are_labelled_by_the_object_they_show() -> None:
    labels = dense_labels(SCENES)
    shown = labels.category > 0
    assert (labels.colour[~shown] == -100).all()
    assert (labels.colour[shown] >= 0).all()
    for row, scene in enumerate(SCENES[:50]):
        assert labels.present[row].nonzero().flatten().tolist() == [CATEGORIES.index(name) for name in scene.present]
        for item in scene.instances:
            patch = int(item.y // 8) * 8 + int(item.x // 8)  # the patch under the centre is within 6.2 pixels
            nearest = min(
                scene.instances,
                key=lambda i: np.hypot(patch % 8 * 8 + 4 - i.x, patch // 8 * 8 + 4 - i.y) / max(6.2, i.r),
            )
            assert labels.category[row, patch] == 1 + CATEGORIES.index(nearest.category)
            assert list(COLOURS)[labels.colour[row, patch]] == nearest.colour
    assert 0.1 < shown.float().mean() < 0.3
    assert labels.present.dtype == torch.float32


def _fake_package(folder: Path) -> SimpleNamespace:
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "0.png")
    questions = [f"Is there a {shape}?" for shape in ("circle", "rectangle", "triangle")] * 4
    return SimpleNamespace(
        get_train_image_paths=lambda: {0: str(folder / "0.png")},
        get_train_questions=lambda: (questions, ["yes"] * 12, [0] * 12),
    )


def test_easy_vqa_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", _fake_package(tmp_path))
    image, turns = EasyVqa().draw(np.random.default_rng(0))
    assert (image.size, image.mode, len(turns)) == ((64, 64), "RGB", 9)
    assert {w.turn.kind for w in turns} == {"vqa"}
    assert turns[0].turn.question in {f"is there a {shape} ?" for shape in ("circle", "rectangle", "triangle")}
    assert turns[0].turn.answer == "yes ."


def test_missing_easy_vqa_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UsageError, match="pip install easy-vqa"):
        EasyVqa()
