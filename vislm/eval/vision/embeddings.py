"""Embeddings as text in a row: float32, exact, a third longer than their bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vislm.errors import AnnotationError

_TYPE = np.dtype("<f4")


def packed(vector: NDArray[np.floating]) -> str:
    """Return a vector (D,) as base64 of its little-endian float32 values."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype=_TYPE).tobytes()).decode("ascii")


def unpacked(text: Any, where: str) -> NDArray[np.float32]:
    """Return the vector (D,) of :func:`packed`.

    Raises:
        AnnotationError: no such text; ``where`` says whose it is.
    """
    try:
        data = base64.b64decode(text, validate=True)
        vector = np.frombuffer(data, _TYPE)
    except (TypeError, ValueError, binascii.Error) as error:
        raise AnnotationError(f"{where}: expected an embedding as base64 of float32 values ({error})") from error
    if not vector.size or not np.isfinite(vector).all():
        raise AnnotationError(f"{where}: the embedding is empty or holds values that are not finite")
    return vector


def stacked(vectors: Sequence[NDArray[np.float32]], where: str) -> NDArray[np.float32]:
    """Return vectors of one length as rows (N, D).

    Raises:
        AnnotationError: they have several lengths.
    """
    lengths = sorted({vector.size for vector in vectors})
    if len(lengths) > 1:
        raise AnnotationError(f"{where}: embeddings of {lengths} values; expected one length for all")
    return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
