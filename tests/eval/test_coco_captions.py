"""COCO captions: metrics, tokenizers, both layouts, extras, whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmm_folders import CAPTIONS, Canned
from lmm_folders import coco_captions as folder

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.captions import caption_extras, caption_metrics, caption_tokens, coco_captions
from vislm.eval.running.runner import run

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "coco_caption" / "human_loo_79.json").read_text())
SENTENCES = st.lists(st.sampled_from("a dog cat on the mat".split()), min_size=0, max_size=9)


def test_the_regex_tokenizer_equals_the_official_one_on_human_captions() -> None:
    for image in map(str, GOLDEN["image_ids"]):
        raw = [GOLDEN["hypothesis"][image], *GOLDEN["references"][image]]
        words = [GOLDEN["tokenized_hypothesis"][image][0], *GOLDEN["tokenized_references"][image]]
        assert caption_tokens.tokenise(raw) == [w.split() for w in words]


def test_tokens() -> None:
    assert caption_tokens.tokenise(["A man can't see “the” T-shirt's (red) stripe... \n and/or dog.."]) == [
        "a man ca n't see the t-shirt 's red stripe and/or dog".split()
    ]
    with pytest.raises(UnknownName, match="caption tokenizer"):
        caption_tokens.tokenise(["a"], "nltk")


def test_ptb_without_java_or_jar(monkeypatch) -> None:
    monkeypatch.setenv("VISLM_PTB_JAR", "/nowhere.jar")
    monkeypatch.setattr(caption_tokens.shutil, "which", lambda _: "java")
    with pytest.raises(UsageError, match="pip install pycocoevalcap"):
        caption_tokens.tokenise(["a"], "ptb")
    monkeypatch.setattr(caption_tokens.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="needs a Java runtime; or use tokenizer='regex'"):
        caption_tokens.tokenise(["a"], "ptb")


def test_ptb_lines_stay_apart(monkeypatch, tmp_path) -> None:
    if caption_extras.unavailable("METEOR"):
        pytest.skip("no Java or no pycocoevalcap")
    assert caption_tokens.tokenise(["A dog.\nSits.", "", "“Naïve” cat"], "ptb") == [
        ["a", "dog", "sits"],
        [],
        ["naïve", "cat"],
    ]


@given(SENTENCES, st.lists(SENTENCES.filter(len), min_size=1, max_size=3))
def test_scores_stay_in_their_range(hypothesis, references) -> None:
    scores = caption_metrics.caption_scores([hypothesis, ["x"]], [references, [["y"]]])
    for name, value in scores.items():
        assert 0.0 <= value <= (10.0 if name == "CIDEr" else 1.0) + 1e-9


def test_a_caption_that_repeats_a_reference_is_perfect() -> None:
    hypotheses = ["a dog on the mat".split(), "two cats in a red box".split()]
    scores = caption_metrics.caption_scores(hypotheses, [[h, ["zebra", "crossing"]] for h in hypotheses])
    assert scores["Bleu_4"] == pytest.approx(1.0)
    assert scores["ROUGE_L"] == pytest.approx(1.0)
    alone = caption_metrics.caption_scores(hypotheses, [[h] for h in hypotheses])
    assert alone["CIDEr"] == pytest.approx(10.0)


def test_cider_of_one_picture_is_zero() -> None:
    assert caption_metrics.cider([["a", "dog"]], [[["a", "dog"]]])[0] == 0.0
    assert caption_metrics.caption_scores([], [])["CIDEr"] == 0.0


def test_order_does_not_matter() -> None:
    ids = [str(i) for i in GOLDEN["image_ids"][:20]]
    shuffled = random.Random(0).sample(ids, len(ids))

    def scores(order: list[str]) -> dict[str, float]:
        said = [GOLDEN["tokenized_hypothesis"][i][0].split() for i in order]
        return caption_metrics.caption_scores(
            said, [[t.split() for t in GOLDEN["tokenized_references"][i]] for i in order]
        )

    assert scores(ids) == pytest.approx(scores(shuffled), abs=1e-12)


def test_a_whole_run(tmp_path) -> None:
    task = coco_captions.load(folder(tmp_path))
    said = {"11": "A dog sits on a mat.", "12": "Cats, playing with wool!", "13": "a zebra"}
    results = run(task, Canned(said), tmp_path / "out")
    words = [s.split() for s in ("a dog sits on a mat", "cats playing with wool", "a zebra")]
    truth = [[caption_tokens.tokenise([c])[0] for c in CAPTIONS[i]] for i in (11, 12, 13)]
    expected = caption_metrics.caption_scores(words, truth)
    assert {k: results["metrics"][k] for k in expected} == pytest.approx(expected)
    assert results["metrics"]["words"] == 4.0
    assert results["config"]["protocol.tokenizer"] == "regex"
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert row["values"]["CIDEr"] == pytest.approx(caption_metrics.cider(words, truth)[1][0])
    assert row["score"] == 1.0


def test_karpathy(tmp_path) -> None:
    task = coco_captions.load(folder(tmp_path), split="karpathy-test")
    assert [(s.id, s.images[0].is_file()) for s in task.samples] == [("11", True), ("12", True)]
    with pytest.raises(AnnotationError, match="no image of the split 'restval'"):
        coco_captions.load(tmp_path, split="karpathy-restval")


def test_layouts(tmp_path) -> None:
    folder(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(AnnotationError, match="several captions files"):
        coco_captions.load(tmp_path)
    assert len(coco_captions.load(tmp_path, split="val2014").samples) == 3
    (tmp_path / "annotations" / "captions_val2014.json").rename(tmp_path / "captions.json")
    for left in (tmp_path / "annotations").iterdir():
        left.unlink()
    (tmp_path / "val2014").rename(tmp_path / "images")
    task = coco_captions.load(tmp_path)
    assert all(s.images[0].is_file() for s in task.samples)


def test_extras_are_skipped_with_their_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(caption_extras.shutil, "which", lambda _: None)
    task = coco_captions.load(folder(tmp_path), meteor=True, spice=True)
    metrics = task.aggregate({"11": {"id": "11", "text": "A dog."}})
    assert metrics["warnings"] == ["METEOR was skipped: no Java runtime", "SPICE was skipped: no Java runtime"]
    assert "METEOR" not in metrics
    assert task.protocol["extras"] == ["METEOR", "SPICE"]
    with pytest.raises(UnknownName, match="extra caption metric"):
        caption_extras.unavailable("BLEURT")


@pytest.mark.slow
@pytest.mark.skipif(bool(caption_extras.unavailable("METEOR")), reason="no Java or no pycocoevalcap")
def test_meteor() -> None:
    ids = [str(i) for i in GOLDEN["image_ids"]]
    said = [GOLDEN["tokenized_hypothesis"][i][0] for i in ids]
    score = caption_extras.extra_score("METEOR", said, [GOLDEN["tokenized_references"][i] for i in ids])
    assert score == pytest.approx(GOLDEN["scores"]["METEOR"], abs=1e-6)


def test_no_captions(tmp_path) -> None:
    assert coco_captions.load(folder(tmp_path)).aggregate({})["warnings"] == ["no captions"]
