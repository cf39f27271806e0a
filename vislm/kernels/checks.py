"""All checks of a kernel call's inputs: each is made once, here, and nothing below checks again."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.bias import Bias
from vislm.kernels.bias_checks import checked_bias
from vislm.kernels.normalization import Sigmoid, checked_normalization
from vislm.kernels.patterns import PATTERNS, Blocked, Pattern
from vislm.kernels.request import AttentionRequest, CheckedStatistics
from vislm.kernels.shapes import Shape, check_bool, check_floating, four_axes
from vislm.kernels.statistics import StatisticsRequest

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_request(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    pattern: Pattern,
    bias: Bias | None,
    scale: float | None,
    normalize: str | Sigmoid,
    statistics: StatisticsRequest | None,
    key_logits: Tensor | None,
) -> AttentionRequest:
    """Return the validated call; raise ``UsageError`` that says what was given, expected and what to do."""
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    _check_heads_first(named)
    shape = Shape(query.shape[0], query.shape[1], query.shape[2], key.shape[2], query.device)
    pattern = _fitted(pattern, shape)
    normalization = checked_normalization(normalize, key.shape[2])
    _check_row_norm(normalization, pattern)
    return AttentionRequest(
        query=query,
        key=key,
        value=value,
        pattern=pattern,
        bias=checked_bias(bias, pattern, shape, query.shape[-1]),
        key_logits=_checked_key_logits(key_logits, shape),
        scale=_checked_scale(scale, query.shape[-1]),
        normalize=normalization,
        statistics=_checked_statistics(
            StatisticsRequest() if statistics is None else statistics, shape, normalization != "softmax"
        ),
    )


def autocasted(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype of ``torch.autocast`` where that is on, as PyTorch's own attention does."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES[:3]:
        return tensor
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if autocasts(device) else tensor


def autocasts(device: str) -> bool:
    """Return whether ``torch.autocast`` is on for a device type."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def checked_head_scale(head_scale: Tensor | None, shape: Shape) -> Tensor | None:
    """Return the factors of the head outputs as ``(Hq, 1, 1)`` or ``(B, Hq, 1, 1)``."""
    if head_scale is None:
        return None
    check_floating("head_scale", head_scale, shape.device)
    if tuple(head_scale.shape) not in ((shape.num_heads,), (shape.batch, shape.num_heads)):
        raise UsageError(
            f"head_scale has shape {tuple(head_scale.shape)}, expected (Hq,) = {(shape.num_heads,)} or (B, Hq) = "
            f"{(shape.batch, shape.num_heads)}"
        )
    return head_scale[..., None, None]


def _check_heads_first(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}, expected a tensor (B, H, N, D)")
        if tensor.ndim != 4:
            raise UsageError(
                f"{name} has shape {tuple(tensor.shape)}, expected 4 axes (B, H, N, D); from (B, N, H * D) use "
                f"{name}.unflatten(-1, (H, -1)).transpose(1, 2)"
            )
        if tensor.dtype not in _DTYPES:
            raise UsageError(
                f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}; convert it with .to(dtype)"
            )
    query, key = named["query"], named["key"]
    for what in ("dtype", "device"):
        given = {name: getattr(tensor, what) for name, tensor in named.items()}
        if len(set(given.values())) > 1:
            listed = ", ".join(f"{name} {kind}" for name, kind in given.items())
            raise UsageError(f"mixed {what}s: {listed}; convert them to one {what} with .to()")
    for name, tensor in named.items():
        if tensor.shape[0] != query.shape[0]:
            raise UsageError(f"{name} has batch size {tensor.shape[0]}, the query {query.shape[0]}; they must agree")
        if name != "query" and tensor.shape[1:3] != key.shape[1:3]:
            raise UsageError(
                f"value has (heads, tokens) = {tuple(tensor.shape[1:3])}, the key {tuple(key.shape[1:3])}; "
                "they must agree"
            )
    if key.shape[3] != query.shape[3]:
        raise UsageError(f"the query has head_dim {query.shape[3]}, the key {key.shape[3]}; they must agree")
    if 0 in (key.shape[1], query.shape[1], query.shape[3]) or query.shape[1] % key.shape[1]:
        raise UsageError(
            f"the query has {query.shape[1]} heads of head_dim {query.shape[3]} and the key {key.shape[1]} heads; "
            "expected the query heads to be a multiple of the key heads, and no empty axis"
        )


def _fitted(pattern: Pattern, shape: Shape) -> Pattern:
    known = isinstance(pattern, PATTERNS)  # asked first because looking at a protocol is slow
    if not known and (isinstance(pattern, type) or not isinstance(pattern, Pattern)):
        names = ", ".join(one.__name__ for one in PATTERNS)
        hint = f"; use an instance: {pattern.__name__}(...)" if isinstance(pattern, type) else ""
        raise UsageError(
            f"unknown pattern {pattern!r}, expected one of {names}, or an object with mask() and fit(){hint}"
        )
    return pattern.fit(shape)


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise UsageError(f"{scale=}, expected a finite number, or None for head_dim ** -0.5")
    return float(scale)


def _check_row_norm(normalize: str | Sigmoid, pattern: Pattern) -> None:
    if normalize == "softmax" or isinstance(normalize, str) or normalize.row_norm is None:
        return
    if isinstance(pattern, Blocked) and (pattern.border == "zero" or max(pattern.query_stride) > 1):
        raise UsageError(
            f"row_norm={normalize.row_norm!r} counts the tokens up to a query's own, which {pattern} does not define; "
            "use row_norm=None"
        )


def _checked_key_logits(key_logits: Tensor | None, shape: Shape) -> Tensor | None:
    if key_logits is None:
        return None
    check_floating("key_logits", key_logits, shape.device)
    batch, num_heads, _, num_keys, _ = shape
    expected = ((num_keys,), (batch, num_keys), (batch, num_heads, num_keys))
    if tuple(key_logits.shape) not in expected:
        raise UsageError(
            f"key_logits has shape {tuple(key_logits.shape)}, expected (Nk,), (B, Nk) or (B, Hq, Nk) with "
            f"(B, Hq, Nk) = {expected[-1]}"
        )
    if key_logits.ndim == 1:
        return four_axes(key_logits)
    return key_logits[:, None, None] if key_logits.ndim == 2 else key_logits[:, :, None]


def _checked_statistics(wanted: StatisticsRequest, shape: Shape, without_lse: bool) -> CheckedStatistics:
    if not isinstance(wanted, StatisticsRequest):
        raise UsageError(f"statistics is a {type(wanted).__name__}, expected a StatisticsRequest")
    if wanted.lse and without_lse:
        raise UsageError("sigmoid attention has no log-sum-exp; ask for mass= or maximum= instead")
    received = wanted.received
    queries = where = None
    if isinstance(received, Tensor) and received.dtype == torch.bool:
        where = _checked_group("received", received, shape.num_queries, "Nq", shape)
    elif isinstance(received, Tensor):
        queries = _checked_index("received", received, shape)
    elif not isinstance(received, bool):
        raise UsageError(f"received is a {type(received).__name__}, expected a bool, query indices or a bool mask")
    mass = None
    if wanted.mass is not None:
        mass = {
            name: _checked_group(f"mass[{name!r}]", group, shape.num_keys, "Nk", shape)
            for name, group in wanted.mass.items()
        }
    return CheckedStatistics(
        lse=wanted.lse,
        rows=None if wanted.rows is None else _checked_index("rows", wanted.rows, shape),
        received=received is True,
        received_queries=queries,
        received_where=where,
        mass=mass,
        entropy=wanted.entropy,
        maximum=wanted.maximum,
        output_norm=wanted.output_norm,
    )


def _checked_index(name: str, given: object, shape: Shape) -> Tensor:
    """Return query indices as int64 (1 or B, R), counted from the front, on the query's device."""
    try:
        index = given if isinstance(given, Tensor) else torch.as_tensor(list(cast("list[int]", given)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}={given!r}, expected integer query indices (R,) or (B, R)") from error
    if index.numel() == 0:
        index = index.long()
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise UsageError(f"{name} is {index.dtype}, expected integer query indices")
    if index.ndim not in (1, 2) or (index.ndim == 2 and len(index) not in (1, shape.batch)):
        raise UsageError(f"{name} has shape {tuple(index.shape)}, expected (R,) or (B, R) with B = {shape.batch}")
    outside = index[(index >= shape.num_queries) | (index < -shape.num_queries)]
    if outside.numel():
        raise UsageError(
            f"{name} holds {int(outside[0])}, expected indices in [{-shape.num_queries}, {shape.num_queries}): "
            f"there are {shape.num_queries} queries"
        )
    index = index.long().to(shape.device) % max(1, shape.num_queries)
    return index if index.ndim == 2 else index[None]


def _checked_group(name: str, group: Tensor, size: int, axis: str, shape: Shape) -> Tensor:
    """Return a bool mask over queries or keys as (1 or B, size)."""
    check_bool(name, group, shape.device)
    if tuple(group.shape) not in ((size,), (1, size), (shape.batch, size)):
        raise UsageError(
            f"{name} has shape {tuple(group.shape)}, expected ({axis},) = {(size,)} or (B, {axis}) = "
            f"{(shape.batch, size)}"
        )
    return group if group.ndim == 2 else group[None]
