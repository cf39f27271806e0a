"""The encoded images and videos of a batch of prompts, whatever shape a family keeps them in."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter


@dataclass(frozen=True)
class Encoding:
    """One call of ``get_image_features`` or ``get_video_features``."""

    arguments: dict[str, Any]
    lengths: list[int]
    """Visual tokens of each entry (what the model encodes as one piece)."""


@dataclass(frozen=True)
class Origin:
    """Which encoded entries an image consists of."""

    modality: str
    entries: range


@dataclass
class Visuals:
    """Images and videos, numbered over the batch in order of appearance; their columns are their tokens in order."""

    adapter: Adapter
    outputs: dict[str, Any]
    """Modality -> what the model's encoder returned."""
    is_visual: Tensor
    """(B, S) bool."""
    image_of: Tensor
    """(B, S) number of the image that a column belongs to, -1 elsewhere."""
    modality: list[str]
    """Of each image."""
    features: list[Tensor] | None
    """(n, C) of each image; None where no images were encoded."""

    @classmethod
    def read(cls, adapter: Adapter, input_ids: Tensor, outputs: Mapping[str, Any] | None) -> Visuals:
        """Find the images of prompts input_ids (B, S).

        Args:
            adapter: of the model.
            input_ids: with placeholders.
            outputs: ``mm_encoder_outputs``.

        Raises:
            UsageError: images and placeholders do not match.
        """
        known = {m: out for m, out in (outputs or {}).items() if out is not None}
        lengths = {m: [len(tokens) for tokens in out.pooler_output] for m, out in known.items()}
        image_of = adapter.number(input_ids, lengths)
        total = int(image_of.max()) + 1
        modality, features = [""] * total, [torch.empty(0)] * total
        for name, placeholder in adapter.visual_ids.items():
            numbers = image_of[input_ids == placeholder]
            own, counts = numbers.unique(return_counts=True)
            flat = _flat(known[name].pooler_output).split(counts.tolist()) if name in known else ()
            for place, number in enumerate(own.tolist()):
                modality[number] = name
                if name in known:
                    features[number] = flat[place]
        complete = bool(known) and all(m in known for m in modality)
        return cls(adapter, known, image_of >= 0, image_of, modality, features if complete else None)

    def shortened(self, keeps: Sequence[Tensor], features: Sequence[Tensor]) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` with new tokens.

        Args:
            keeps: (n,) bool of each image, the seats that stay.
            features: (m, C) of each image, what sits there.
        """
        outputs: dict[str, Any] = {}
        for name, output in self.outputs.items():
            own = [number for number, m in enumerate(self.modality) if m == name]
            tokens: Any = [features[number] for number in own]
            if isinstance(output.pooler_output, Tensor):  # tiles or videos of one size, which the model flattens
                tokens = torch.cat(tokens).unsqueeze(0)
            changed: dict[str, Any] = {"pooler_output": tokens}
            if getattr(output, "deepstack_features", None) is not None:
                keep = torch.cat([keeps[number] for number in own])
                changed["deepstack_features"] = [[_flat(depth)[keep]] for depth in output.deepstack_features]
            outputs[name] = replace(output, **changed)
        return outputs

    def origins(self, encodings: Mapping[str, Encoding]) -> list[Origin]:
        """Return where each image comes from; beam search repeats every sample's images."""
        origins: list[Origin | None] = [None] * len(self.modality)
        for name, encoding in encodings.items():
            numbers = {number for number, m in enumerate(self.modality) if m == name}
            bounds = [0, *itertools.accumulate(encoding.lengths)]
            here = torch.isin(self.image_of, torch.tensor(sorted(numbers), device=self.image_of.device))
            beams = max(1, int(here.sum()) // max(1, bounds[-1]))
            first = [0, *itertools.accumulate(here.sum(-1).tolist()[::beams])]
            for row in range(len(here)):
                begin = first[row // beams]
                for number, count in zip(*_counts(self.image_of[row][here[row]]), strict=True):
                    entries = range(bisect.bisect_right(bounds, begin) - 1, bisect.bisect_left(bounds, begin + count))
                    origins[number] = Origin(name, entries)
                    begin += count
        return [origin if origin is not None else Origin("", range(0)) for origin in origins]


def _flat(tokens: Any) -> Tensor:
    """Return (N, C) of a list of (n, C), or of a tensor (K, n, C)."""
    return tokens.flatten(0, 1) if isinstance(tokens, Tensor) else torch.cat(list(tokens))


def _counts(numbers: Tensor) -> tuple[list[int], list[int]]:
    own, counts = numbers.unique_consecutive(return_counts=True)
    return own.tolist(), counts.tolist()
