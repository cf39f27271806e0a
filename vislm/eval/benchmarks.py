"""POPE and CHAIR as benchmarks, and building a benchmark by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName
from vislm.eval import chair, pope
from vislm.eval.coco import CocoFolder, read_coco_folder
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.scene_pope import oracle_table, scene_questions
from vislm.eval.vocabulary import Vocabulary, coco_vocabulary, vocabulary_of

BENCHMARKS = {
    "pope": "POPE: yes/no questions about present and absent objects, three splits",
    "chair": "CHAIR: hallucinated objects in captions",
}
"""Name -> one line."""


@dataclass(frozen=True)
class Pope(Benchmark):
    """POPE. Questions that several splits share are asked once."""

    questions: Sequence[pope.Question]
    paths: Mapping[str, Path]
    """Image name -> file."""
    rule: str = "official"
    how: str = "official files"
    control: Control = "none"
    objects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    themes: Mapping[str, str | None] = field(default_factory=dict)
    name = "pope"
    max_new_tokens = 8
    figures = (
        Figure("accuracy"),
        Figure("f1", "f1", ("label", "answer")),
        Figure("yes_ratio", "mean", ("answer",), better="neither"),
        Figure("auroc", "auroc", ("label", "margin")),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per different pair of image and question."""
        first = {key: asked[0] for key, asked in self._asked.items()}
        return [
            Sample(key, (self.paths[q.image],), q.text, truth=q.label, candidates=("yes", "no"))
            for key, q in first.items()
        ]

    @cached_property
    def _asked(self) -> dict[str, list[pope.Question]]:
        """Sample id -> the questions of the splits that it answers."""
        found: dict[str, list[pope.Question]] = {}
        for question in self.questions:
            found.setdefault(_key(question), []).append(question)
        return found

    @property
    def protocol(self) -> dict[str, Any]:
        """Parser and origin of the questions."""
        return {"questions": self.how, "parser": self.rule, "n_questions": len(self.questions)}

    def parse(self, row: Row) -> Verdict:
        """Return yes, no, or what the rule makes of other answers."""
        asked, answer = self._asked[row["id"]], pope.parse(row["text"], self.rule)
        values = {"label": float(asked[0].label == "yes"), "answer": float(answer == "yes")}
        margin = _margin(row)
        if margin is not None:
            values["margin"] = margin
        parts = tuple(dict.fromkeys(q.split for q in asked))
        if answer == "dropped":
            return Verdict(None, None, {}, parts)
        return Verdict(answer, float(answer == asked[0].label), values, parts)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the metrics of each split and, as "mean", of all of them unweighted."""
        result: dict[str, Any] = {}
        answered = [(q, rows[_key(q)]) for q in self.questions if _key(q) in rows]
        for split in dict.fromkeys(q.split for q, _ in answered):
            result[split] = self._metrics([(q, r) for q, r in answered if q.split == split])
        shared = [k for k in ("accuracy", "f1", "yes_ratio", "auroc") if all(k in r for r in result.values())]
        result["mean"] = {k: sum(r[k] for r in result.values()) / max(1, len(result)) for k in shared}
        if self.objects and all(q.id.count("/") == 2 for q in self.questions):
            result["oracles"] = oracle_table(self.questions, self.objects, self.themes)
        return result

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the metrics of the questions about each object, all splits together."""
        found: dict[str, list[tuple[pope.Question, Row]]] = {}
        for question in self.questions:
            name = pope.object_of(question.text)
            if name and _key(question) in rows:
                found.setdefault(name, []).append((question, rows[_key(question)]))
        keys = ("n", "accuracy", "recall", "yes_ratio")
        return {name: {k: self._metrics(found[name])[k] for k in keys} for name in sorted(found)}

    def _metrics(self, answered: Sequence[tuple[pope.Question, Row]]) -> dict[str, Any]:
        margins = [m for _, r in answered if (m := _margin(r)) is not None]
        return pope.metrics(
            [q.label for q, _ in answered],
            [pope.parse(r["text"], self.rule) for _, r in answered],
            margins if len(margins) == len(answered) else None,
        )


def _key(question: pope.Question) -> str:
    return f"{question.image}|{question.text}"


def _margin(row: Row) -> float | None:
    """Return how much likelier yes is than no, in logits; None where a row lacks them."""
    logits = row.get("candidates") or {}
    return logits["yes"] - logits["no"] if "yes" in logits and "no" in logits else None


@dataclass(frozen=True)
class Chair(Benchmark):
    """CHAIR on captions of the given images."""

    paths: Mapping[str, Path]
    truth: Mapping[str, Collection[str]]
    vocabulary: Vocabulary
    prompt: str = "Please describe this image in detail."
    max_new_tokens: int = 512
    control: Control = "none"
    name = "chair"
    figures = (
        Figure("CHAIR_i", "ratio", ("hallucinated", "mentions"), better="lower"),
        Figure("CHAIR_s", "mean", ("chair_s",), better="lower"),
        Figure("Recall", "ratio", ("correct", "objects")),
        Figure("Length", "mean", ("length",), better="neither"),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One caption per image."""
        return [Sample(i, (path,), self.prompt, truth=sorted(self.truth[i])) for i, path in self.paths.items()]

    @property
    def protocol(self) -> dict[str, Any]:
        """Prompt, length limit and scorer."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "scorer": "pattern",
            "n_images": len(self.paths),
        }

    def parse(self, row: Row) -> Verdict:
        """Return the objects that the caption names; the score is 1 if none of them is absent."""
        scored = self._score(row["id"], row["text"])
        values = {
            "chair_s": scored.chair_s,
            "hallucinated": len(scored.hallucinated),
            "mentions": len(scored.mentions.nodes),
            "correct": len(scored.correct),
            "objects": len(scored.truth),
            "length": len(scored.mentions.tokens),
        }
        return Verdict(scored.mentions.nodes, 1.0 - scored.chair_s, values)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return CHAIR_s, CHAIR_i, Recall and Length over all captions."""
        return chair.overall(list(self.per_caption(rows).values()))

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return for each object its mentions, how many were wrong, and the share of its images that name it."""
        return chair.by_object(list(self.per_caption(rows).values()))

    def per_caption(self, rows: Rows) -> dict[str, chair.CaptionScore]:
        """Return sample id -> its caption's objects, the wrong ones among them, and its own figures."""
        return {i: self._score(i, r["text"]) for i, r in rows.items() if i in self.truth}

    def _score(self, image: str, caption: str) -> chair.CaptionScore:
        """Score a caption once: verdict, metrics and groups all need it."""
        known = self._scored
        if (image, caption) not in known:
            known[image, caption] = chair.score_caption(caption, self.truth[image], self.vocabulary)
        return known[image, caption]

    @cached_property
    def _scored(self) -> dict[tuple[str, str], chair.CaptionScore]:
        return {}


def load_benchmark(
    name: str, path: str | Path, *, control: Control = "none", limit: int | None = None, seed: int = 0
) -> Benchmark:
    """Build a benchmark from a folder in COCO's format (instances.json, images/, perhaps captions.json).

    For POPE the folder may instead hold the official question files (named ...random.json, ...popular.json,
    ...adversarial.json) and images/.

    Args:
        name: "pope" or "chair".
        path: e.g. what ``vislm data scenes`` writes.
        control: "grey" replaces every picture.
        limit: use the first images only.
        seed: of the questions that are drawn at random.

    Raises:
        UnknownName: no such benchmark.
        AnnotationError: a folder that is incomplete or broken.
    """
    if name not in BENCHMARKS:
        raise UnknownName("benchmark", name, BENCHMARKS)
    files = [file for split in pope.SPLITS for file in sorted(Path(path).glob(f"*{split}.json*"))]
    if name == "pope" and files and not (Path(path) / "instances.json").is_file():
        return _official_pope(Path(path), files, control, limit)
    folder = read_coco_folder(Path(path))
    images = list(folder.images)[:limit]
    if not images:
        raise AnnotationError(f"{path} holds no images")
    build: Callable[..., Benchmark] = _pope if name == "pope" else _chair
    return build(folder, images, control, seed)


def _official_pope(root: Path, files: Sequence[Path], control: Control, limit: int | None) -> Pope:
    questions = [question for file in files for question in pope.read_questions(file)]
    images = list(dict.fromkeys(q.image for q in questions))[:limit]
    place = {name: number for number, name in enumerate(images)}
    questions = sorted((q for q in questions if q.image in place), key=lambda q: place[q.image])
    how = f"official files {', '.join(file.name for file in files)}"
    return Pope(questions, {name: root / "images" / name for name in images}, how=how, control=control)


def _pope(folder: CocoFolder, images: list[int], control: Control, seed: int) -> Pope:
    import random

    names = {i: folder.images[i] for i in images}
    paths = {names[i]: folder.path(i) for i in images}
    objects = {names[i]: folder.objects[i] for i in images}
    if folder.is_scenes:
        themes = {names[i]: folder.themes.get(i) for i in images}
        questions = scene_questions(objects, seed)
        return Pope(questions, paths, how=f"scenes, seed {seed}", control=control, objects=objects, themes=themes)
    enough = {name: shown for name, shown in objects.items() if len(shown) >= 3}
    if not enough:
        raise AnnotationError(f"{folder.root}: no image shows three different objects, which POPE needs")
    questions = [q for split in pope.SPLITS for q in pope.build(enough, split, random.Random(seed))]
    place = {name: number for number, name in enumerate(enough)}
    questions.sort(key=lambda q: place[q.image])  # so that the first N samples hold all splits
    return Pope(questions, paths, how=f"official algorithm, seed {seed}", control=control)


def _chair(folder: CocoFolder, images: list[int], control: Control, seed: int) -> Chair:
    coco = coco_vocabulary()
    is_coco = set(folder.categories.values()) <= set(coco.objects)
    vocabulary = coco if is_coco else vocabulary_of(list(folder.categories.values()))
    captions = {i: folder.captions[i] for i in images if i in folder.captions}
    truth = chair.ground_truth({i: folder.objects[i] for i in images}, captions, vocabulary)
    paths = {folder.images[i]: folder.path(i) for i in images}
    by_name = {folder.images[i]: truth[i] for i in images}
    if folder.is_scenes:
        return Chair(paths, by_name, vocabulary, "Describe the image.", 64, control)
    return Chair(paths, by_name, vocabulary, control=control)
