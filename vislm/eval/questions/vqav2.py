"""VQAv2: open questions about COCO pictures.

Source: Goyal et al., "Making the V in VQA Matter", CVPR 2017, arXiv 1612.00837; visualqa.org.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Control
from vislm.eval.questions.human_answers import HumanAnswers, HumanQuestion, answers_of
from vislm.eval.reading import (
    Fault,
    Once,
    build_rows,
    find_file,
    find_folder,
    find_optional,
    id_of,
    read_json,
    rows_of,
    text_of,
    whole_of,
)

SPLITS = ("val2014", "train2014", "test2015", "test-dev2015")
_MOST = 10**12


class VqaV2(HumanAnswers):
    """VQAv2."""

    name = "vqav2"


def load(path: Path, *, split: str = "val2014", suffix: str = "short", control: Control = "none") -> VqaV2:
    """Read VQAv2.

    Args:
        path: folder with v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/.
        split: val2014, train2014, or a test split (answers secret: pictures in test2015/, no annotations).
        suffix: see ``vislm.eval.prompts.SUFFIXES``.
        control: grey pictures or not.

    Raises:
        AnnotationError: files that are missing or no JSON; bad rows become ``faults`` instead.
    """
    if split not in SPLITS:
        raise UnknownName("split of VQAv2", split, SPLITS)
    secret, folder = split.startswith("test"), "test2015" if split.startswith("test") else split
    file = find_file(path, [f"v2_OpenEnded_mscoco_{split}_questions.json"], "VQAv2 questions")
    faults: list[str] = []
    notes = None if secret else _annotations(path, split, faults)
    images, once, end = find_folder(path, [folder, "images"]), Once("question_id"), suffix_text(suffix)

    def question(row: dict[str, Any]) -> HumanQuestion:
        key, image = once(id_of(row, "question_id")), whole_of(row, "image_id", 0, _MOST)
        asked, answers, kind = text_of(row, "question") + end, (), ""
        if notes is not None:
            if key not in notes:
                raise Fault("has no annotation")
            about, answers, kind = notes[key]
            if about != image:
                raise Fault(f"is about image {image}, its annotation about image {about}")
        return HumanQuestion(key, images / f"COCO_{folder}_{image:012d}.jpg", asked, answers, kind)

    rows = rows_of(file, read_json(file, dict), "questions")
    questions = build_rows(file, rows, question, faults, id_key="question_id")
    if notes is not None:
        orphans = [key for key in notes if key not in once.seen]
        faults += [f"{file.name}: no question for the annotation of question_id {key}" for key in orphans]
    return VqaV2(questions, {"split": split, "suffix": suffix}, control, faults)


def _annotations(path: Path, split: str, faults: list[str]) -> dict[str, tuple[int, tuple[str, ...], str]]:
    names = [f"v2_mscoco_{split}_annotations.json"]
    file = find_optional(path, names) or find_file(path, names, "VQAv2 annotations")
    once = Once("question_id")

    def note(row: dict[str, Any]) -> tuple[str, tuple[int, tuple[str, ...], str]]:
        key, answers = once(id_of(row, "question_id")), answers_of(row)
        if not answers:
            raise Fault("has no answers")
        return key, (whole_of(row, "image_id", 0, _MOST), answers, text_of(row, "answer_type"))

    return dict(
        build_rows(file, rows_of(file, read_json(file, dict), "annotations"), note, faults, id_key="question_id")
    )
