"""AMBER: yes/no questions about existence, attributes and relations, and descriptions, on 1,004 pictures.

Source: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv
2311.07397; github.com/junyangwang0410/AMBER. ``amber_scores`` holds the figures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.questions import amber_scores
from vislm.eval.questions.amber_words import VECTORS, Nouns, Similarity, nltk_nouns, spacy_similarity
from vislm.eval.questions.yes_no import margin, ranking_warnings
from vislm.eval.reading import (
    Fault,
    Once,
    build_rows,
    find_file,
    find_folder,
    read_json,
    read_text,
    safe_path,
    shown,
    text_of,
    texts_of,
    whole_of,
)

TASKS = ("discriminative", "generative", "all")
PARSERS = ("first-word", "exact")
GENERATIVE = "generative"
QUESTION_FIGURES = (
    Figure("accuracy", "mean", ("correct",)),
    Figure("f1", "f1", ("label", "answer")),
    Figure("yes_ratio", "mean", ("yes",), better="neither"),
    Figure("auroc", "auroc", ("label_yes", "margin")),
)
CAPTION_FIGURES = (
    Figure("CHAIR", "ratio", ("hallucinated", "nouns"), better="lower"),
    Figure("Cover", "ratio", ("covered", "objects")),
    Figure("Hal", "mean", ("hal",), better="lower"),
    Figure("Cog", "ratio", ("imagined", "expected"), better="lower"),
    Figure("Length", "mean", ("length",), better="neither"),
)


@dataclass(frozen=True)
class AmberItem:
    """One query with its annotation."""

    id: str
    image: Path
    query: str
    kind: str
    """The annotation's type."""
    truth: str | tuple[str, ...]
    """yes or no; the objects in the picture of a generative item."""
    hallu: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    """What descriptions are compared with."""

    related: Mapping[str, Sequence[str]]
    safe: Collection[str]
    nouns: Nouns
    similarity: Similarity


@dataclass(frozen=True)
class Amber(Benchmark):
    """AMBER. The positive class of its yes/no questions is No, that is, finding what is not there."""

    items: Sequence[AmberItem]
    settings: Mapping[str, Any]
    words: Words | None = None
    parser: str = "first-word"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    max_new_tokens: int = 16
    figures: tuple[Figure, ...] = QUESTION_FIGURES
    name = "amber"

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per query."""
        end = suffix_text(self.settings["suffix"])
        return [
            Sample(i.id, (i.image,), i.query, truth=list(i.truth))
            if i.kind == GENERATIVE
            else Sample(i.id, (i.image,), i.query + end, truth=i.truth, candidates=("yes", "no"))
            for i in self.items
        ]

    @cached_property
    def _by_id(self) -> dict[str, AmberItem]:
        return {i.id: i for i in self.items}

    @property
    def protocol(self) -> dict[str, Any]:
        """Part, suffix, parser, word vectors."""
        return {**self.settings, "parser": self.parser, "n_questions": len(self.items)}

    def parse(self, row: Row) -> Verdict:
        """Return Yes or No (None for other answers), or the nouns of a description."""
        item = self._by_id[row["id"]]
        if item.kind == GENERATIVE:
            return self._described(item, row["text"])
        answer = parse_answer(row["text"], self.parser)
        right = float(answer == str(item.truth).capitalize())
        values = {"correct": right, "label": float(item.truth == "no"), "answer": float(answer == "No")}
        values |= {"label_yes": float(item.truth == "yes"), "yes": float(answer == "Yes")}
        yes_no = margin(row)
        if yes_no is not None:
            values["margin"] = yes_no
        return Verdict(answer if answer in ("Yes", "No") else None, right, values, (amber_scores.dimension(item.kind),))

    def _described(self, item: AmberItem, text: str) -> Verdict:
        count, nouns = self._count(item, text)
        values = {
            "hallucinated": count.hallucinated,
            "nouns": count.nouns,
            "covered": count.covered,
            "objects": count.truth,
            "hal": float(count.hallucinated > 0),
            "imagined": count.imagined,
            "expected": count.hallu,
            "length": _words_in(text),
        }
        return Verdict(nouns, 1.0 - values["hal"], values, (GENERATIVE,))

    def _count(self, item: AmberItem, text: str) -> tuple[amber_scores.CaptionCount, list[str]]:
        assert self.words is not None  # ``load`` refuses generative items without
        w, nouns = self.words, list(self.words.nouns(text))
        return amber_scores.describe(nouns, item.truth, item.hallu, w.related, w.safe, w.similarity), nouns

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the official figures in percent, and how many answers had to be rewritten as Yes or No.

        Beside them, in each table, the share of Yes ("yes_ratio") and where rows hold logits their AUROC, also in
        percent; of descriptions the mean length in words ("Length").
        """
        asked = [(self._by_id[i], row["text"]) for i, row in rows.items()]
        questions = [(item, text) for item, text in asked if item.kind != GENERATIVE]
        answers = [parse_answer(text, self.parser) for _, text in questions]
        kinds, truths = [item.kind for item, _ in questions], [str(item.truth) for item, _ in questions]
        metrics: dict[str, Any] = amber_scores.discriminative(list(zip(kinds, truths, answers, strict=True)))
        margins = [margin(rows[item.id]) for item, _ in questions]
        for name, figures in amber_scores.beside(list(zip(kinds, truths, answers, margins, strict=True))).items():
            metrics[name] |= figures
        metrics["n_normalised"] = sum(a != text for (_, text), a in zip(questions, answers, strict=True))
        metrics["n_unparsed"] = sum(answer not in ("Yes", "No") for answer in answers)
        described = [self._count(item, text)[0] for item, text in asked if item.kind == GENERATIVE]
        if described:
            words = [_words_in(text) for item, text in asked if item.kind == GENERATIVE]
            metrics["generative"] = {**amber_scores.generative(described), "Length": sum(words) / len(words)}
        if described and questions:
            metrics["AMBER"] = (100 - metrics["generative"]["CHAIR"] + metrics["all"]["f1"]) / 2
        metrics["n"] = len(rows)
        warnings = ranking_warnings([t == "yes" for t in truths], margins) if rows else ["no answers"]
        return {**metrics, "warnings": warnings} if warnings else metrics


def _words_in(text: str) -> int:
    return len(text.split())


def parse_answer(text: str, parser: str) -> str:
    """Return "Yes" or "No", or the answer as it is.

    "exact" takes the answer as it stands, which is what the official script counts; "first-word" rewrites answers whose
    first word is yes or no in any case, as its instructions ask the user to do.

    Raises:
        UnknownName: no such parser.
    """
    if parser not in PARSERS:
        raise UnknownName("AMBER parser", parser, PARSERS)
    first = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) if parser == "first-word" else None
    return first[1].capitalize() if first else text


def load(
    path: Path,
    *,
    task: str = "discriminative",
    suffix: str = "short",
    parser: str = "first-word",
    vectors: str = VECTORS,
    similarity: Similarity | None = None,
    nouns: Nouns | None = None,
    control: Control = "none",
) -> Amber:
    """Read AMBER.

    Args:
        path: folder with data/ (annotations.json, relation.json, safe_words.txt, query/query_discriminative.json,
            query/query_generative.json) and image/; data/ may also lie in ``path`` itself, its files may be .gz.
        task: discriminative (14,216 questions), generative (1,004 descriptions) or all.
        suffix: behind the yes/no questions; see ``vislm.eval.prompts.SUFFIXES``.
        parser: first-word or exact; see :func:`parse_answer`.
        vectors: the spaCy model of the generative part's word vectors.
        similarity: of two words; in place of spaCy.
        nouns: of a text; in place of NLTK.
        control: grey pictures or not.

    Raises:
        UsageError: generative items without word vectors or a noun finder.
        AnnotationError: files that are missing or no JSON; bad rows become ``faults`` instead.
    """
    parse_answer("", parser)
    if task not in TASKS:
        raise UnknownName("part of AMBER", task, TASKS)
    root = path / "data" if (path / "data").is_dir() else path
    settings: dict[str, Any] = {"task": task, "suffix": suffix}
    words = None
    if task != "discriminative":
        settings["vectors"] = "similarity=" if similarity else vectors
        words = _words(root, nouns or nltk_nouns(), similarity or spacy_similarity(vectors))
    faults: list[str] = []
    notes = _annotations(find_file(root, ["annotations.json"], "AMBER annotations"), faults)
    images, once, items = find_folder(path, ["image", "images"]), Once("id"), []
    for part in TASKS[:2] if task == "all" else (task,):
        file = find_file(root, [f"query/query_{part}.json", f"query_{part}.json"], f"AMBER's {part} queries")
        items += build_rows(
            file, read_json(file, list), lambda row: _item(row, notes, once, images), faults, id_key="id"
        )
    wrong = [i.id for i in items if task != "all" and (i.kind == GENERATIVE) != (task == GENERATIVE)]
    if wrong:
        raise AnnotationError(f"{path}: the queries of {task} hold items of the other part, first id {wrong[0]}")
    longest = 16 if task == "discriminative" else 512
    figures = {"discriminative": QUESTION_FIGURES, "generative": CAPTION_FIGURES}
    return Amber(
        items,
        settings,
        words,
        parser,
        control,
        faults,
        longest,
        figures.get(task, QUESTION_FIGURES + CAPTION_FIGURES),
    )


def _item(row: dict[str, Any], notes: Mapping[int, dict[str, Any]], once: Once, images: Path) -> AmberItem:
    number = whole_of(row, "id", 1)
    if number not in notes:
        raise Fault("has no annotation")
    note, image = notes[number], safe_path(images, text_of(row, "image"))
    item = AmberItem(once(str(number)), image, text_of(row, "query"), note["type"], note["truth"], note["hallu"])
    return item


def _annotations(file: Path, faults: list[str]) -> dict[int, dict[str, Any]]:
    once = Once("id")

    def note(row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number, kind = whole_of(row, "id", 1), text_of(row, "type")
        once(str(number))
        if kind == GENERATIVE:
            truth, hallu = tuple(texts_of(row, "truth")), tuple(texts_of(row, "hallu"))
            return number, {"type": kind, "truth": truth, "hallu": hallu}
        if row.get("truth") not in ("yes", "no"):
            raise Fault(f"truth is {shown(row.get('truth'))}; expected yes or no")
        return number, {"type": kind, "truth": row["truth"], "hallu": ()}

    return dict(build_rows(file, read_json(file, list), note, faults, id_key="id"))


def _words(root: Path, nouns: Nouns, similarity: Similarity) -> Words:
    file = find_file(root, ["relation.json"], "AMBER's word associations")
    related = read_json(file, dict)
    for name, words in related.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise AnnotationError(f"{file}: the associations of {name!r} are no list of texts")
    safe = read_text(find_file(root, ["safe_words.txt"], "AMBER's safe words")).split("\n")
    return Words(related, frozenset(word.strip() for word in safe if word.strip()), nouns, similarity)
