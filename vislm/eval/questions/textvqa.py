"""TextVQA: questions that can only be answered by reading text in the picture.

Source: Singh et al., "Towards VQA Models That Can Read", CVPR 2019, arXiv 1904.08920; textvqa.org.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Control
from vislm.eval.questions.human_answers import HumanAnswers, HumanQuestion, answers_of
from vislm.eval.reading import (
    Once,
    build_rows,
    find_file,
    find_folder,
    id_of,
    read_json,
    rows_of,
    safe_path,
    text_of,
    texts_of,
)

SPLITS = ("val", "train", "test")


class TextVqa(HumanAnswers):
    """TextVQA."""

    name = "textvqa"


def load(
    path: Path, *, split: str = "val", ocr: bool = False, suffix: str = "short", control: Control = "none"
) -> TextVqa:
    """Read TextVQA 0.5.1.

    Args:
        path: folder with TextVQA_0.5.1_val.json and train_images/ (which holds the pictures of val, too).
        split: val (5,000 questions), train or test (answers secret).
        ocr: put the tokens of TextVQA_Rosetta_OCR_v0.2_val.json behind the question ("Reference OCR token: ..."), as
            LLaVA-1.5's 58.2 has it; without them the same model reaches about 46.
        suffix: see ``vislm.eval.prompts.SUFFIXES``.
        control: grey pictures or not.

    Raises:
        AnnotationError: files that are missing or no JSON; bad rows become ``faults`` instead.
    """
    if split not in SPLITS:
        raise UnknownName("split of TextVQA", split, SPLITS)
    file = find_file(path, [f"TextVQA_0.5.1_{split}.json"], "TextVQA questions")
    images = find_folder(path, ["test_images" if split == "test" else "train_images", "images"])
    faults: list[str] = []
    tokens = _tokens(path, split, faults) if ocr else None
    once, end = Once("question_id"), suffix_text(suffix)

    def question(row: dict[str, Any]) -> HumanQuestion:
        key, image = once(id_of(row, "question_id")), id_of(row, "image_id")
        prompt = text_of(row, "question")
        if tokens is not None:
            prompt += f"\nReference OCR token: {', '.join(tokens.get(image, ()))}"
        return HumanQuestion(key, safe_path(images, f"{image}.jpg"), prompt + end, answers_of(row))

    rows = rows_of(file, read_json(file, dict), "data")
    settings = {"split": split, "suffix": suffix, "ocr_tokens": ocr}
    return TextVqa(build_rows(file, rows, question, faults, id_key="question_id"), settings, control, faults)


def _tokens(path: Path, split: str, faults: list[str]) -> dict[str, list[str]]:
    file = find_file(path, [f"TextVQA_Rosetta_OCR_v0.2_{split}.json"], "OCR tokens")
    once = Once("image_id")

    def one(row: dict[str, Any]) -> tuple[str, list[str]]:
        return once(id_of(row, "image_id")), texts_of(row, "ocr_tokens")

    return dict(build_rows(file, rows_of(file, read_json(file, dict), "data"), one, faults, id_key="image_id"))
