"""Fixtures of short answers: EvalAI's normalisation and agreement, MME, ScienceQA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vislm.eval.questions import mme
from vislm.eval.questions.choice_answers import scienceqa_answer
from vislm.eval.questions.vqa_answers import contractions, normalise, vqa_score
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact

LETTERS = "ABCDE"
TOLERANCE = 1e-9


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by their keys."""
    data = fixture.data
    if "normalise" in data or "textvqa" in data:
        yield from _answers(data)
    elif "contractions" in data:
        yield exact("contractions", contractions(), data["contractions"])
    elif "items" in data and "totals" in data:
        yield from _mme(data)
    elif "items" in data and all("llava_answer" in item for item in data["items"]):
        yield from _scienceqa(data["items"])
    else:
        raise Unhandled(f"keys {sorted(data)} belong to no known fixture of short answers")


def _answers(data: dict[str, Any]) -> Iterator[Comparison]:
    for raw, expected in data.get("normalise", ()):
        yield exact(f"normalise {raw!r}", normalise(raw), expected)
    for number, item in enumerate(data.get("textvqa", ())):
        score = vqa_score(item["pred_answer"], item["gt_answers"])
        yield Comparison(f"textvqa.{number}", abs(score - item["score"]), TOLERANCE)


def _mme(data: dict[str, Any]) -> Iterator[Comparison]:
    pictures: dict[str, dict[str, list[float]]] = {}
    for number, item in enumerate(data["items"]):
        answer = mme.parse_answer(item["prediction"])
        right = float(answer == item["answer"].strip().lower())
        yield exact(f"{number}.parsed", answer, item["parsed"])
        yield exact(f"{number}.score", right, item["score"])
        pictures.setdefault(item["category"], {}).setdefault(item["question_id"], []).append(right)
    scores = {task: mme.task_score(list(right.values()))["score"] for task, right in pictures.items()}
    for area, tasks in (("perception", mme.PERCEPTION), ("cognition", mme.COGNITION)):
        key = f"mme_{area}_score"
        if key in data["totals"]:
            ours = sum(scores.get(task, 0.0) for task in tasks)
            yield Comparison(key, abs(ours - data["totals"][key]), TOLERANCE)
    for line in data.get("per_category", ()):
        task, _, score = line.partition(": ")
        yield exact(f"category {task}", f"{scores[task]:.2f}", score)


def _scienceqa(items: list[dict[str, Any]]) -> Iterator[Comparison]:
    for item in items:
        text = item["text"]
        yield exact(f"llava {text!r}", scienceqa_answer(text) or "FAILED", item["llava_answer"])
        if "lmms_eval_score" in item:
            letter = scienceqa_answer(text, "lmms-eval")
            scores = [float(letter == LETTERS[k]) for k in range(len(item["lmms_eval_score"]))]
            yield exact(f"lmms-eval {text!r}", scores, item["lmms_eval_score"])
