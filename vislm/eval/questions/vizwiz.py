"""VizWiz-VQA: questions that blind people asked about their own photographs, some of which cannot be answered.

Source: Gurari et al., "VizWiz Grand Challenge", CVPR 2018, arXiv 1802.08218; vizwiz.org.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Control
from vislm.eval.questions.human_answers import HumanAnswers, HumanQuestion, answers_of
from vislm.eval.reading import Fault, Once, build_rows, find_file, find_folder, read_json, safe_path, text_of

SPLITS = ("val", "train", "test")
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""What LLaVA puts before its suffix; a model that is not told rarely says so."""


class VizWiz(HumanAnswers):
    """VizWiz-VQA."""

    name = "vizwiz"


def load(
    path: Path, *, split: str = "val", suffix: str = "short", hint: bool = True, control: Control = "none"
) -> VizWiz:
    """Read VizWiz-VQA.

    Args:
        path: folder with val.json (or Annotations/val.json) and val/, the pictures.
        split: val (4,319 questions), train or test (answers secret).
        suffix: see ``vislm.eval.prompts.SUFFIXES``.
        hint: tell the model to answer Unanswerable where it should (LLaVA's words).
        control: grey pictures or not.

    Raises:
        AnnotationError: a file that is missing or no JSON; bad rows become ``faults`` instead.
    """
    if split not in SPLITS:
        raise UnknownName("split of VizWiz", split, SPLITS)
    file = find_file(path, [f"{split}.json", f"Annotations/{split}.json"], "VizWiz annotations")
    images, once, faults = find_folder(path, [split, "images"]), Once("image"), []
    end = (UNANSWERABLE if hint else "") + suffix_text(suffix)

    def question(row: dict[str, Any]) -> HumanQuestion:
        image = once(text_of(row, "image"))
        answers = answers_of(row)
        if not answers and split != "test":
            raise Fault("has no answers")
        kind = text_of(row, "answer_type") if answers else ""
        return HumanQuestion(image, safe_path(images, image), text_of(row, "question") + end, answers, kind)

    questions = build_rows(file, read_json(file, list), question, faults, id_key="image")
    return VizWiz(questions, {"split": split, "suffix": suffix, "unanswerable_hint": hint}, control, faults)
