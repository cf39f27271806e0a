"""Edits of attention rows that several head methods share."""

from __future__ import annotations

from torch import Tensor

from vislm.lmm.decoder.key_groups import KeyGroups


def scale_groups(logits: Tensor, keys: KeyGroups, image: float, before: float) -> Tensor:
    """Return logits (B, H, R, K) times ``image`` on image keys and times ``before`` on the keys in front of them."""
    return logits * keys.factors(image, before, 1.0)


def silence_text(weights: Tensor, keys: KeyGroups, threshold: float, rows: Tensor | None = None) -> Tensor:
    """Return weights (B, H, R, K) without the keys behind the image, in rows that give those ``threshold`` or more.

    Nothing is put in their place: such a row sums to what was left.

    Args:
        weights: after the softmax.
        keys: which is what.
        threshold: of a row's sum over these keys.
        rows: (H, R or 1, 1) bool: rows that may be silenced; None: all.
    """
    text = keys.after[:, None, None]
    silent = weights @ text.mT.to(weights.dtype) >= threshold
    if rows is not None:
        silent = silent & rows
    return weights.masked_fill(text & silent, 0.0)
