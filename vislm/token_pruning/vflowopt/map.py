"""VFlowOpt's importance map: attention of the anchor tokens of one vision layer, and the entropy of the pixels.

Notation: K crops with N patches, P prefix tokens (CLS). Everything is computed in float32.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from vislm import kernels
from vislm.errors import UsageError
from vislm.lmm.choosing.tokens import compact, gather_rows
from vislm.lmm.decoder.attention import AttentionCall

Pixels = Literal["auto", "clip", "siglip", "imagenet", "unit", "wrapped"]
"""How the processor has normalised the pixels; "unit": to 0..1; "wrapped": the official arithmetic on them as they
are, times 255 and modulo 256."""

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS = {"clip": _CLIP, "siglip": _HALF, "imagenet": _IMAGENET, "unit": ((0.0,) * 3, (1.0,) * 3)}
_TOWERS = {
    "clip": "clip",
    "siglip": "siglip",
    "siglip2": "siglip",
    "idefics3": "siglip",
    "smolvlm": "siglip",
    "internvl": "imagenet",
}


def context(call: AttentionCall, t: float, prefix: int, empty_anchors: Literal["strongest", "nan"]) -> Tensor:
    """Return m (K, N): the attention that patches get from the anchors, on average over anchors and heads.

    Anchors are the patches that receive more than ``t`` times the mean attention. Of CLS neither row nor column
    counts. Neither step forms the N x N matrix: the first is a sum over queries, the second visits the anchors' rows.

    Args:
        call: the attention of one vision layer.
        t: threshold over the mean.
        prefix: P.
        empty_anchors: without any anchor, take the patch that receives most, or return NaN as the official code does.
    """
    queries = torch.arange(call.query.shape[2], device=call.query.device) >= prefix
    received = call.statistics(kernels.StatisticsRequest(received=queries if prefix else True)).received
    assert received is not None
    score = received[:, :, prefix:].mean(1)
    anchors = score > t * score.mean(-1, keepdim=True)
    empty = ~anchors.any(-1)
    if bool(empty.any()):
        if empty_anchors == "strongest":
            warnings.warn(
                "vflowopt: no patch receives more than t times the mean attention; its strongest one is the only "
                "anchor (lower t)",
                stacklevel=1,  # seen as coming from this module, wherever the tower is called from
            )
        strongest = torch.nn.functional.one_hot(score.argmax(-1), score.shape[1]).bool()
        anchors = torch.where(empty[:, None], strongest, anchors)
    mean = _rows_sum(call, anchors, prefix)[:, :, prefix:].mean(1) / anchors.sum(-1, keepdim=True)
    return mean.masked_fill(empty[:, None], torch.nan) if empty_anchors == "nan" else mean


def _rows_sum(call: AttentionCall, anchors: Tensor, prefix: int) -> Tensor:
    """Return (K, H, P + N): the attention rows of the anchors (K, N) bool, summed."""
    if call.mask is not None:
        queries = torch.nn.functional.pad(anchors, (prefix, 0))
        received = call.statistics(kernels.StatisticsRequest(received=queries)).received
    else:
        index, valid = compact(anchors, pad="right")
        query = gather_rows(call.query.transpose(1, 2), index + prefix).transpose(1, 2)
        request = kernels.StatisticsRequest(received=True if valid is None else valid)
        received = kernels.attention_statistics(query, call.key, request=request, scale=call.scale).received
    assert received is not None
    return received


def grey_levels(pixels: Tensor, normalised: Pixels, tower: str) -> Tensor:
    """Return the grey level 0..255 of normalised pixels (K, 3, H, W): the rounded mean of the colours, (K, H, W) int64.

    Args:
        pixels: as the tower receives them.
        normalised: see :data:`Pixels`; "auto" goes by the tower.
        tower: the ``model_type`` of the tower's configuration.

    Raises:
        UsageError: "auto" with a tower whose processor is not known.
    """
    if normalised == "wrapped":
        levels = (pixels.float() * 255.0).to(torch.int32).bitwise_and(255)
    else:
        mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in _statistics(normalised, tower))
        levels = ((pixels.float() * std + mean) * 255.0).round().clamp(0, 255)
    return (levels.sum(1) / 3.0).round().long()


def _statistics(normalised: Pixels, tower: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if normalised == "auto":
        name = _TOWERS.get(tower.removesuffix("_vision").removesuffix("_vision_model"))
        if name is None:
            raise UsageError(
                f"vflowopt: how the images of a {tower!r} tower are normalised is not known, and alpha needs their "
                f"pixels; give pixels= one of {', '.join(_STATISTICS)}, or alpha=0"
            )
        return _STATISTICS[name]
    return _STATISTICS[normalised]


def patch_entropy(levels: Tensor, patch: int) -> Tensor:
    """Return the entropy E (K, N) in bits of the grey levels (K, H, W) within every patch of ``patch`` x ``patch``.

    E = -sum over 256 levels of p log2(p + 1e-10). Pixels beyond the last whole patch do not count.
    """
    crops, rows, columns = levels.shape[0], levels.shape[1] // patch, levels.shape[2] // patch
    whole = levels[:, : rows * patch, : columns * patch].unflatten(1, (rows, patch)).unflatten(3, (columns, patch))
    cells = whole.permute(0, 1, 3, 2, 4).reshape(crops * rows * columns, patch * patch)
    first = 256 * torch.arange(len(cells), device=cells.device).unsqueeze(1)
    counts = torch.bincount((cells + first).flatten(), minlength=256 * len(cells)).view(-1, 256)
    p = counts.float() / (patch * patch)
    return -(p * (p + 1e-10).log2()).sum(-1).view(crops, rows * columns)


def importance(context: Tensor, entropy: Tensor | None, alpha: float) -> Tensor:
    """Return I = m + alpha softmax(E), shape (K, N); the softmax runs over the patches of a crop."""
    if entropy is None:
        return context
    return context + alpha * torch.softmax(entropy, dim=-1)
