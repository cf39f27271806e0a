"""A benchmark = samples, what to ask, and a pure function from answers to metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from vislm.errors import AnnotationError, UnknownName
from vislm.eval import chair, pope
from vislm.eval.coco import CocoFolder, read_coco_folder
from vislm.eval.scene_pope import oracle_table, scene_questions
from vislm.eval.vocabulary import Vocabulary, coco_vocabulary, vocabulary_of

BENCHMARKS = {
    "pope": "POPE: yes/no questions about present and absent objects, three splits",
    "chair": "CHAIR: hallucinated objects in captions",
}
"""Name -> one line."""

Control = Literal["none", "grey"]
"""grey: every picture is replaced by a plain grey one; what is still right comes from language alone."""


@dataclass(frozen=True)
class Sample:
    """One thing to ask."""

    id: str
    image: Path
    prompt: str


class Benchmark(Protocol):
    """What the runner needs."""

    name: str
    max_new_tokens: int
    candidates: tuple[str, ...]
    control: Control

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, with unique ids."""
        ...

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result must state besides the model: prompt, parser, how questions were chosen."""
        ...

    def score(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return metrics from the finished rows (id -> row); needs no model."""
        ...


@dataclass(frozen=True)
class Pope:
    """POPE. Questions that several splits share are asked once."""

    questions: Sequence[pope.Question]
    paths: Mapping[str, Path]
    """Image name -> file."""
    rule: str = "official"
    how: str = "official files"
    control: Control = "none"
    objects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    themes: Mapping[str, str | None] = field(default_factory=dict)
    name: str = "pope"
    max_new_tokens: int = 8
    candidates: tuple[str, ...] = ("yes", "no")

    @property
    def samples(self) -> list[Sample]:
        """One sample per different pair of image and question."""
        return [
            Sample(key, self.paths[image], text)
            for key, (image, text) in {_key(q): (q.image, q.text) for q in self.questions}.items()
        ]

    @property
    def protocol(self) -> dict[str, Any]:
        """Parser and origin of the questions."""
        return {"questions": self.how, "parser": self.rule, "n_questions": len(self.questions), "control": self.control}

    def score(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the metrics of each split and, as "mean", of all of them unweighted."""
        result: dict[str, Any] = {}
        for split in dict.fromkeys(q.split for q in self.questions):
            asked = [(q, rows[_key(q)]) for q in self.questions if q.split == split and _key(q) in rows]
            margins = [r["candidates"]["yes"] - r["candidates"]["no"] for _, r in asked]
            predictions = [pope.parse(r["text"], self.rule) for _, r in asked]
            result[split] = pope.metrics([q.label for q, _ in asked], predictions, margins)
        shared = ("accuracy", "f1", "yes_ratio", "auroc")
        result["mean"] = {k: sum(r[k] for r in result.values()) / max(1, len(result)) for k in shared}
        if self.objects and all(q.id.count("/") == 2 for q in self.questions):
            result["oracles"] = oracle_table(self.questions, self.objects, self.themes)
        return result


def _key(question: pope.Question) -> str:
    return f"{question.image}|{question.text}"


@dataclass(frozen=True)
class Chair:
    """CHAIR on captions of the given images."""

    paths: Mapping[str, Path]
    truth: Mapping[str, Collection[str]]
    vocabulary: Vocabulary
    prompt: str = "Please describe this image in detail."
    max_new_tokens: int = 512
    control: Control = "none"
    name: str = "chair"
    candidates: tuple[str, ...] = ()

    @property
    def samples(self) -> list[Sample]:
        """One caption per image."""
        return [Sample(image, path, self.prompt) for image, path in self.paths.items()]

    @property
    def protocol(self) -> dict[str, Any]:
        """Prompt, length limit and scorer."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "scorer": "pattern",
            "n_images": len(self.paths),
            "control": self.control,
        }

    def score(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return CHAIR_s, CHAIR_i, Recall and Length over all captions."""
        return chair.overall(
            [chair.score_caption(r["text"], self.truth[i], self.vocabulary) for i, r in rows.items() if i in self.truth]
        )


def load_benchmark(
    name: str, path: str | Path, *, control: Control = "none", limit: int | None = None, seed: int = 0
) -> Benchmark:
    """Build a benchmark from a folder in COCO's format (instances.json, images/, perhaps captions.json).

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
    folder = read_coco_folder(Path(path))
    images = list(folder.images)[:limit]
    if not images:
        raise AnnotationError(f"{path} holds no images")
    build: Callable[..., Benchmark] = _pope if name == "pope" else _chair
    return build(folder, images, control, seed)


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


GREY = (128, 128, 128)


def picture(sample: Sample, control: Control) -> Image.Image:
    """Return the sample's picture, decoded with all checks; a plain grey one of its size for the grey control."""
    from vislm.images import load_image

    image = load_image(sample.image)
    return Image.new("RGB", image.size, GREY) if control == "grey" else image
