"""Recall at K between pictures and texts.

Source of the rule: LAION-AI/CLIP_benchmark (zero-shot retrieval); Karpathy and Fei-Fei, CVPR 2015, arXiv 1412.2306.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vislm.errors import UsageError

KS = (1, 5, 10)
_CHUNK = 256
"""Queries that are compared at once: 25,000 captions make 50 MB of similarities."""
_DIGITS = 9
"""Decimals of a similarity that count: equal embeddings tie in whatever order the products were summed."""

Array = NDArray[np.float64]


def recalls(
    images: NDArray[np.floating], texts: NDArray[np.floating], owner: Sequence[int], ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return "text_to_image_R@k" and "image_to_text_R@k" for each k and their mean, fractions.

    text -> image: texts whose picture is among the k nearest. image -> text: pictures of which at least one own text
    is among the k nearest. Similarity is the cosine; of equal similarities the earlier picture or text comes first.

    Args:
        images: embeddings (I, D) of any length.
        texts: embeddings (T, D).
        owner: picture (row of ``images``) that each text describes.
        ks: how many neighbours count.

    Raises:
        UsageError: shapes that do not fit, pictures without a text, embeddings that are zero or not finite.
    """
    to_image, to_text = ranks(images, texts, owner)
    found = {f"text_to_image_R@{k}": float(np.mean(to_image < k)) for k in ks}
    found |= {f"image_to_text_R@{k}": float(np.mean(to_text < k)) for k in ks}
    return {**found, "mean_recall": sum(found.values()) / max(1, len(found))}


def ranks(
    images: NDArray[np.floating], texts: NDArray[np.floating], owner: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each text's rank of its picture (T,), and each picture's rank of its best own text (I,), from 0.

    Raises:
        UsageError: as :func:`recalls`.
    """
    own = np.asarray(owner, dtype=np.int64)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or own.shape != (len(texts),):
        raise UsageError(
            f"embeddings of shape {images.shape} and {texts.shape} with {own.size} owners; expected (I, D), (T, D), T"
        )
    place = np.arange(len(images))
    if not np.array_equal(np.unique(own), place):
        raise UsageError("every text must describe one of the pictures, and every picture needs a text")
    a, b = _unit(images, "picture"), _unit(texts, "text")
    return _ranks(b, a, own, place), _ranks(a, b, place, own)


def _unit(rows: NDArray[np.floating], what: str) -> Array:
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if bad.size:
        raise UsageError(f"the embedding of {what} {bad[0]} is zero or not finite")
    return wide / lengths


def _ranks(
    queries: Array, gallery: Array, query_ids: NDArray[np.int64], gallery_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many of the gallery come before the first that has the query's id."""
    order, found = np.arange(len(gallery)), []
    for start in range(0, len(queries), _CHUNK):
        near = np.round(queries[start : start + _CHUNK] @ gallery.T, _DIGITS)
        own = query_ids[start : start + _CHUNK, None] == gallery_ids
        best = np.where(own, near, -np.inf).max(axis=1, keepdims=True)
        tied = near == best
        first = (own & tied).argmax(axis=1)[:, None]
        found.append((near > best).sum(axis=1) + (tied & (order < first)).sum(axis=1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)
