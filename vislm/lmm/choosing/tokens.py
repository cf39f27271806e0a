"""Index arithmetic on rows of tokens: compacting, ragged rows, ranking within images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError


def compact(keep: Tensor, pad: Literal["left", "right"]) -> tuple[Tensor, Tensor | None]:
    """Turn keep (B, N) bool into ascending indices (B, n), n the largest count of a row.

    Rows that keep fewer are padded on the given side with an index of a dropped column. Returns ``(index, valid)`` with
    valid (B, n) bool, or None when no row is padded.
    """
    counts = keep.sum(-1)
    width = int(counts.max())
    order = torch.argsort(keep.to(torch.int8), dim=-1, stable=True, descending=pad == "right")
    index = order[:, :width] if pad == "right" else order[:, keep.shape[-1] - width :]
    if bool((counts == width).all()):
        return index, None
    valid = keep.gather(1, index)
    return index, valid


def gather_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather tokens (B, N, ...) at index (B, n) along dimension 1; a leading batch of 1 is broadcast."""
    if tokens.shape[0] != index.shape[0]:
        tokens = tokens.expand(index.shape[0], *tokens.shape[1:])
    view = index.reshape(*index.shape, *(1,) * (tokens.dim() - 2)).expand(*index.shape, *tokens.shape[2:])
    return tokens.gather(1, view)


def top_per_image(scores: Tensor, image_of: Tensor, keep: int | float) -> Tensor:
    """Return (B, S) bool: every column that belongs to no image, and each image's ``keep`` best columns.

    Args:
        scores: (B, S), compared in float32; ties go to the lower column.
        image_of: (B, S) int64, -1 outside images.
        keep: tokens per image, or a ratio in (0, 1].
    """
    kept = image_of < 0
    scores = scores.float()
    for row in range(image_of.shape[0]):
        for image in image_of[row][image_of[row] >= 0].unique().tolist():
            columns = (image_of[row] == image).nonzero().squeeze(1)
            best = torch.argsort(scores[row, columns], descending=True, stable=True)
            kept[row, columns[best[: token_count(keep, len(columns))]]] = True
    return kept


def token_count(keep: int | float, total: int) -> int:
    """Return how many of ``total`` tokens a budget keeps: tokens, or a ratio in (0, 1] rounded, at least 1."""
    if isinstance(keep, float):
        return max(1, min(total, round(keep * total)))
    return min(keep, total)


def check_keep(keep: int | float) -> None:
    """Raise ``UsageError`` unless ``keep`` is a number of tokens >= 1 or a ratio in (0, 1].

    A budget above an image's tokens is no error: it keeps them all.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise UsageError(f"keep={keep!r}: expected a number of visual tokens such as 64, or a ratio such as 0.25")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise UsageError(f"keep={keep}: a ratio must lie in (0, 1]; give an integer for a number of tokens")
    if isinstance(keep, int) and keep < 1:
        raise UsageError(f"keep={keep}: at least one visual token must stay")


def index_in_images(image_of: Tensor) -> Tensor:
    """Return (B, S) int64: a visual column's place in its image's token sequence, -1 outside images.

    Args:
        image_of: (B, S) number of the image, ascending over the batch as ``number_images`` gives it; -1 elsewhere.
    """
    visual = image_of >= 0
    numbers = image_of[visual]
    starts = torch.nn.functional.pad(numbers.bincount().cumsum(0), (1, 0))
    index = torch.full_like(image_of, -1)
    index[visual] = torch.arange(len(numbers), device=numbers.device) - starts[numbers]
    return index


def number_images(is_image: Tensor, lengths: list[int] | None) -> Tensor:
    """Number the image columns of a batch of prompts.

    Args:
        is_image: (B, S) bool, True on image placeholders.
        lengths: visual tokens of every image in order of appearance; None numbers each run of placeholders.

    Returns:
        (B, S) int64: number of the image, counted over the whole batch; -1 elsewhere.
    """
    image_of = torch.full(is_image.shape, -1, dtype=torch.int64, device=is_image.device)
    if lengths is None:
        starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
        numbers = starts.flatten().cumsum(0).view_as(image_of) - 1
        return torch.where(is_image, numbers, image_of)
    check_lengths(is_image, lengths)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    image_of[is_image] = numbers.to(image_of.device)
    return image_of


def check_lengths(is_image: Tensor, lengths: list[int]) -> None:
    """Raise ``UsageError`` unless images with so many visual tokens fill the placeholders is_image (B, S)."""
    total = int(is_image.sum())
    if sum(lengths) != total:
        raise UsageError(
            f"the images give {sum(lengths)} visual tokens but the prompts hold {total} image placeholders; "
            "build both with the same processor (chunked prefill cannot be combined with token pruning)"
        )


def in_order_of_appearance(keys: Tensor) -> Tensor:
    """Return (B, S) int64: the groups of keys (B, S) >= 0, each of them contiguous, numbered as they appear."""
    numbers = torch.full_like(keys, -1)
    inside = keys >= 0
    numbers[inside] = torch.unique_consecutive(keys[inside], return_inverse=True)[1]
    return numbers
