"""Image-text models of open_clip as zero-shot classifiers: one text embedding per class, made once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError, VislmError
from vislm.eval.protocol import Asked
from vislm.eval.vision.class_lists import ClassList, ClassSample
from vislm.eval.vision.classifier import best, classes_of
from vislm.eval.vision.open_clip_model import OpenClip, open_clip_model
from vislm.eval.vision.timm_model import enough_memory
from vislm.eval.vision.zero_shot import template_lines

_TEXTS = 800
"""Prompts that are encoded at once."""


@contextlib.contextmanager
def open_zero_shot(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[ZeroShotModel]:
    """Load an image-text model; arguments and errors: see ``vislm.eval.vision.open_clip_model``."""
    with open_clip_model(model, prune, heads, dtype, device) as clip:
        yield ZeroShotModel(clip)


class ZeroShotModel:
    """Answers with the class whose prompts are nearest to the picture."""

    def __init__(self, clip: OpenClip) -> None:
        self._clip = clip
        self._classifiers: dict[tuple[str, str], Tensor] = {}

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's own fingerprint."""
        return self._clip.fingerprint()

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the rows of a batch: "text" is the best class, "top" and "logits" (100 x cosine) the first five.

        Raises:
            UsageError: samples without classes.
            VislmError: the device's memory does not suffice, or an embedding is not finite.
        """
        with enough_memory(len(batch)):
            weights = [self._classifier(asked) for asked in batch]
            pixels = self._clip.pixels([asked.images[0] for asked in batch])
            started = time.perf_counter()
            features = self._clip.image_features(pixels)
            seconds = (time.perf_counter() - started) / len(batch)
            cost = {"seconds": seconds, **self._clip.cost.of(self._clip.image_features, pixels)}
        if not features.isfinite().all():
            raise VislmError("the model's embeddings are not finite: wrong weights, or too narrow a --dtype")
        return [
            {**best(100.0 * feature @ weight.T, classes_of(asked)), **cost}
            for feature, weight, asked in zip(features, weights, batch, strict=True)
        ]

    def _classifier(self, asked: Asked) -> Tensor:
        classes, sample = classes_of(asked), asked.sample
        assert isinstance(sample, ClassSample)
        key = (classes.digest, sample.templates)
        if key not in self._classifiers:
            self._classifiers[key] = text_classifier(self._clip, class_texts(classes), templates_of(sample.templates))
        return self._classifiers[key]


def text_classifier(clip: OpenClip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return ``(C, D)``: for each class the normalised mean of the normalised embeddings of its prompts.

    Args:
        clip: the model.
        names: C names of classes.
        templates: T texts, each with one ``{}``.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    step = max(1, _TEXTS // len(templates)) * len(templates)  # whole classes: their sums do not depend on the step
    parts = []
    for start in range(0, len(prompts), step):
        features = clip.text_features(prompts[start : start + step])
        parts.append(features.view(-1, len(templates), features.shape[-1]).mean(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def class_texts(classes: ClassList) -> Sequence[str]:
    """Return what the classes are called in prompts.

    Raises:
        UsageError: they have no names and are not ImageNet's.
    """
    if classes.texts is not None:
        return classes.texts
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    if len(classes.names) != len(IMAGENET_CLASSNAMES):
        raise UsageError(f"{len(classes.names)} classes have no names for prompts; expected a classes=FILE with names")
    return IMAGENET_CLASSNAMES


def templates_of(chosen: str) -> list[str]:
    """Return the templates that a sample names, each with one ``{}``."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    library = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    if chosen in library:
        return [template("{}") for template in library[chosen]]
    return template_lines(chosen)
