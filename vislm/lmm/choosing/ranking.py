"""Ranking the visual columns that are alive inside the language model, image by image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vislm.lmm.decoder.attention import AttentionCall

Place = tuple[int, int]
"""(row of the batch, number of the image)."""


def last_row(call: AttentionCall) -> Tensor:
    """Return the head mean (B, Nk) of the last query's attention, softmaxed over all keys, float32."""
    return call.rows(torch.tensor([-1])).squeeze(2).mean(1)


def sample_call(call: AttentionCall, row: int) -> AttentionCall:
    """Return the call of one row of the batch alone (B = 1); views, nothing is copied."""
    one = slice(row, row + 1)
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[one]
    return AttentionCall(call.query[one], call.key[one], call.value[one], mask, call.is_causal, call.scale)


def image_columns(image_of: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Yield every image in ``image_of`` (B, S) with its columns (n,), ascending; -1 belongs to no image."""
    for row in range(image_of.shape[0]):
        for image in image_of[row][image_of[row] >= 0].unique().tolist():
            yield (row, image), (image_of[row] == image).nonzero().squeeze(1)


def token_counts(image_of: Tensor) -> dict[Place, int]:
    """Return how many columns of each image are in ``image_of`` (B, S)."""
    return {place: len(columns) for place, columns in image_columns(image_of)}


def top(scores: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the highest scores (n,), best first; ties go to the lower index."""
    return torch.argsort(scores.float(), descending=True, stable=True)[:count]


def top_counts(scores: Tensor, image_of: Tensor, counts: Mapping[Place, int]) -> Tensor:
    """Return keep (B, S) bool: every column of no image, and each image's own count of best columns.

    Args:
        scores: (B, S), compared in float32; ties go to the lower column.
        image_of: (B, S) int64, -1 outside images.
        counts: tokens that each image keeps; more than it has means all.
    """
    keep = image_of < 0
    for (row, image), columns in image_columns(image_of):
        keep[row, columns[top(scores[row, columns], counts[row, image])]] = True
    return keep
