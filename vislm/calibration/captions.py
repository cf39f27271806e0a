"""The model's own captions, and where in them objects are named that the picture does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.calibration.row_heads import RowHeads, Silenced
from vislm.calibration.samples import Sample
from vislm.errors import UsageError
from vislm.eval.captions.chair_scores import mentions
from vislm.eval.captions.tokenize import tokenize
from vislm.eval.captions.vocabulary import Vocabulary
from vislm.lmm.model import LMM


@dataclass(frozen=True)
class Caption:
    """A generated caption of n tokens with M object words."""

    sample: Sample
    ids: list[int]
    """The n tokens."""
    places: list[int]
    """Of the first token of every object word."""
    hallucinated: list[bool]
    """Whether it names an object that is not there."""


def write_caption(lmm: LMM, sample: Sample, max_new_tokens: int) -> list[int]:
    """Return the token ids of the untouched model's greedy answer."""
    inputs: Any = lmm.prepare([sample.image], [sample.question])
    with torch.no_grad():
        out = lmm.model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False
        )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def read_caption(lmm: LMM, sample: Sample, ids: Sequence[int], vocabulary: Vocabulary) -> Caption:
    """Find the object words of a caption.

    Raises:
        UsageError: nobody has said what the sample's picture shows.
    """
    if sample.objects is None:
        raise UsageError("some samples have no objects; list what each picture shows in samples.jsonl")
    truth = {vocabulary.node_of.get(name, name) for name in sample.objects}

    def text(count: int) -> str:
        return lmm.processor.tokenizer.decode(ids[:count], skip_special_tokens=True).lower()

    found, starts = mentions(text(len(ids)), vocabulary), _word_starts(text(len(ids)))
    lengths = [len(text(count)) for count in range(1, len(ids) + 1)]
    places = [next(n for n, length in enumerate(lengths) if length > starts[index]) for index in found.indices]
    return Caption(sample, list(ids), places, [node not in truth for node in found.nodes])


def _word_starts(text: str) -> list[int]:
    """Return where each word of ``tokenize(text)`` begins."""
    starts, at = [], 0
    for word in tokenize(text):
        place = text.find(word, at)
        starts.append(max(place, at))
        at = starts[-1] if place < 0 else place + len(word)  # quotation marks are written in another way
    return starts


def word_probabilities(lmm: LMM, caption: Caption, rows: RowHeads) -> Tensor:
    """Return (B, M): the probability of every object word's first token, with each row's head silenced, float32."""
    count = len(rows.heads)
    inputs: Any = lmm.prepare([caption.sample.image] * count, [caption.sample.question] * count)
    width, own = inputs["input_ids"].shape[1], torch.tensor(caption.ids, device=lmm.model.device)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == (count, width):
            tail = own if name == "input_ids" else torch.full_like(own, int(name == "attention_mask"))
            inputs[name] = torch.cat([value, tail.to(value).expand(count, -1)], 1)
    with lmm.using(Silenced(rows)), torch.no_grad():
        logits = lmm.model(**inputs, logits_to_keep=len(own) + 1).logits[:, caption.places]
    return logits.float().softmax(-1)[:, torch.arange(len(caption.places)), own[caption.places]].cpu()
