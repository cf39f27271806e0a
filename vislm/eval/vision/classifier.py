"""Classifiers of timm and vislm as subjects of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.eval.protocol import Asked
from vislm.eval.vision.class_lists import ClassList, ClassSample
from vislm.eval.vision.timm_model import TimmModel, timm_model

TOP = 5


@contextlib.contextmanager
def open_classifier(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[Classifier]:
    """Load a classifier; arguments and errors: see :func:`vislm.eval.vision.timm_model.timm_model`."""
    with timm_model(model, prune, heads, dtype, device) as loaded:
        yield Classifier(loaded)


class Classifier:
    """Answers with the likeliest of a picture's possible classes."""

    def __init__(self, loaded: TimmModel) -> None:
        self._loaded = loaded

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's own fingerprint."""
        return self._loaded.fingerprint()

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the rows of a batch: "text" is the best class, "top" and "logits" the first five.

        Raises:
            UsageError: samples without classes, or as many classes as the model has no outputs for.
            VislmError: the device's memory does not suffice, or an output is not finite.
        """
        logits, cost = self._loaded.run(self._loaded.model, batch)
        return [{**best(scores, classes_of(asked)), **cost} for scores, asked in zip(logits, batch, strict=True)]


def classes_of(asked: Asked) -> ClassList:
    """Return the classes that a sample names; raise ``UsageError`` for one that names none."""
    if not isinstance(asked.sample, ClassSample):
        raise UsageError(f"sample {asked.sample.id} names no classes; a classifier needs a benchmark such as imagenet")
    return asked.sample.classes


def best(scores: Tensor, classes: ClassList) -> dict[str, Any]:
    """Return the five best of the possible classes.

    Args:
        scores: ``(C,)``, one for each class.
        classes: C of them; impossible ones are left out before the best is chosen.

    Raises:
        UsageError: another number of scores.
    """
    if len(scores) != len(classes.names):
        raise UsageError(
            f"the model has {len(scores)} outputs, the data {len(classes.names)} classes; for data that is not "
            "ImageNet name the model's classes in a file: classes=FILE"
        )
    places = torch.tensor(classes.possible)
    values, order = scores[places].topk(min(TOP, len(places)))
    names = [classes.names[places[i]] for i in order.tolist()]
    return {"text": names[0], "top": names, "logits": [round(v, 4) for v in values.tolist()]}
