"""An open_clip model as the subject of image-text retrieval: a row holds the embeddings of a picture and its texts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vislm.errors import UsageError
from vislm.eval.protocol import Asked
from vislm.eval.vision.embeddings import packed
from vislm.eval.vision.open_clip_model import OpenClip, open_clip_model

_TEXTS = 256
"""Texts that are encoded at once."""


@contextlib.contextmanager
def open_image_text(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[ImageText]:
    """Load an open_clip model with its tokenizer; arguments and errors as ``open_clip_model``."""
    with open_clip_model(model, prune, heads, dtype, device) as clip:
        yield ImageText(clip)


class ImageText:
    """Embeds each sample's picture and its ``choices``."""

    def __init__(self, clip: OpenClip) -> None:
        self._clip = clip

    def fingerprint(self) -> dict[str, Any]:
        """Return weights, preprocessing, dtype and merging, flat."""
        return self._clip.fingerprint()

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return "image" (embedding), "texts" (one embedding per choice) and costs; ``max_new_tokens`` is not used.

        Raises:
            UsageError: a sample without exactly one picture.
        """
        began = time.perf_counter()
        for asked in batch:
            if len(asked.images) != 1:
                raise UsageError(f"sample {asked.sample.id} has {len(asked.images)} pictures; expected one")
        pixels = self._clip.pixels([asked.images[0] for asked in batch])
        images = self._clip.image_features(pixels).numpy()
        texts = iter(self._texts([text for asked in batch for text in asked.sample.choices]))
        seconds = (time.perf_counter() - began) / len(batch)
        cost = self._clip.cost.of(self._clip.image_features, pixels)
        return [
            {
                "text": "",
                "image": packed(image),
                "texts": [next(texts) for _ in asked.sample.choices],
                "seconds": seconds,
                **cost,
            }
            for asked, image in zip(batch, images, strict=True)
        ]

    def _texts(self, texts: Sequence[str]) -> Iterator[str]:
        for start in range(0, len(texts), _TEXTS):
            for row in self._clip.text_features(texts[start : start + _TEXTS]).numpy():
                yield packed(row)
