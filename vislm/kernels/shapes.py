"""The sizes of a call, and the checks of single tensors that everything here shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.errors import UsageError


class Shape(NamedTuple):
    """The sizes of one attention call: ``B``, ``Hq``, ``Nq``, ``Nk`` and the device of its tensors."""

    batch: int
    num_heads: int
    num_queries: int
    num_keys: int
    device: torch.device


def shape_of(query: Tensor, key: Tensor) -> Shape:
    """Return the sizes of a call by its query ``(B, Hq, Nq, D)`` and key ``(B, Hkv, Nk, D)``."""
    batch, num_heads, num_queries, _ = query.shape
    return Shape(batch, num_heads, num_queries, key.shape[2], query.device)


def broadcasts_to(given: Sequence[int], full: Sequence[int]) -> bool:
    """Return whether a tensor of shape ``given`` expands to exactly ``full``."""
    pairs = zip(reversed(given), reversed(full), strict=False)
    return len(given) <= len(full) and all(size in (1, whole) for size, whole in pairs)


def four_axes(tensor: Tensor) -> Tensor:
    """Return the tensor with axes of size 1 put in front until it has four."""
    return tensor[(None,) * (4 - tensor.ndim)]


def check_broadcast(name: str, tensor: Tensor, shape: Shape) -> None:
    """Raise ``UsageError`` unless the tensor broadcasts to ``(B, Hq, Nq, Nk)``."""
    if not broadcasts_to(tensor.shape, shape[:4]):
        raise UsageError(
            f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to (B, Hq, Nq, Nk) = {shape[:4]}; "
            "insert axes of size 1 where it is shared"
        )


def check_bool(name: str, mask: Tensor, device: torch.device) -> None:
    """Raise ``UsageError`` unless ``mask`` is a bool tensor on the call's device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise UsageError(f"{name} is {_kind(mask)}, expected a torch.bool tensor; use mask.bool()")
    _check_device(name, mask, device)


def check_floating(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ``UsageError`` unless ``tensor`` is a floating-point tensor on the call's device."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        hint = "; a bool mask goes into pattern=Masked(mask)" if _kind(tensor) == "torch.bool" else ""
        raise UsageError(f"{name} is {_kind(tensor)}, expected a floating-point tensor{hint}")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UsageError(f"{name} is on {tensor.device}, the query on {device}; move it with .to(query.device)")


def _kind(given: object) -> str:
    return str(given.dtype) if isinstance(given, Tensor) else f"a {type(given).__name__}"
