"""Importance of every head of a ViT: what the prediction loses when the head's output is zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.analysis.metrics import METRICS, Prediction, effects
from vislm.analysis.results import padded_stack
from vislm.analysis.vision import Site, scaled_heads
from vislm.errors import UsageError

PROXY = "first_order"
"""|sum g_h o_h|: the loss's gradient at a gate on the head, in magnitude, mean over samples."""

Predict = Callable[[Tensor], Prediction]


def predictor(model: nn.Module) -> Predict:
    """Return what computes a model's prediction of images (n, 3, H, W).

    Models of timm and vislm give logits and the features in front of their classifier; a model with ``encode_image``
    (an open_clip one) or without classifier gives features alone.
    """
    inner: Any = model
    if hasattr(inner, "encode_image"):
        return lambda images: Prediction(None, inner.encode_image(images))
    if not (hasattr(inner, "forward_features") and hasattr(inner, "forward_head")):
        return lambda images: Prediction(None, inner(images))

    def predict(images: Tensor) -> Prediction:
        tokens = inner.forward_features(images)
        features = inner.forward_head(tokens, pre_logits=True)
        classes = getattr(inner, "num_classes", 0)
        return Prediction(inner.forward_head(tokens) if classes else None, features)

    return predict


def head_importance(
    sites: Sequence[Site],
    predict: Predict,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    rows: int = 32,
) -> dict[str, Tensor]:
    """Return metric -> (L, H), NaN where a layer has fewer heads: means over images without one head at a time.

    Heads of a layer run together, as rows of a batch. Class and register tokens stay.

    Args:
        sites: from :func:`vislm.analysis.vision.readable`.
        predict: from :func:`predictor`.
        images: (n, 3, H, W).
        labels: (n,) true classes; None: what the whole model predicts.
        rows: images per forward pass.

    Raises:
        UsageError: not one label per image.
    """
    if labels is not None and labels.shape != (len(images),):
        raise UsageError(f"labels have shape {tuple(labels.shape)}, expected one per image, ({len(images)},)")
    with torch.no_grad():
        base = predict(images)
        if labels is None and base.logits is not None:
            labels = base.logits.argmax(-1)
        by_layer: list[dict[str, list[Tensor]]] = []
        for layer, site in enumerate(sites):
            found: dict[str, list[Tensor]] = {}
            together = max(1, rows // len(images))
            for heads in torch.arange(site.heads).split(together):
                factors = torch.ones(len(heads), site.heads, device=images.device)
                factors[torch.arange(len(heads)), heads] = 0.0
                factors = factors.repeat_interleave(len(images), 0)
                repeated = images.repeat(len(heads), *(1,) * (images.dim() - 1))
                with scaled_heads(sites, lambda n, own=factors, at=layer: own if n == at else None):
                    without = predict(repeated)
                for number in range(len(heads)):
                    part = slice(number * len(images), (number + 1) * len(images))
                    for name, change in effects(base, without[part], labels).items():
                        found.setdefault(name, []).append(change.mean())
            by_layer.append(found)
    maps = {
        name: padded_stack([torch.stack(found[name]) for found in by_layer]) for name in METRICS if name in by_layer[0]
    }
    if labels is not None and base.logits is not None:
        maps[PROXY] = first_order(sites, predict, images, labels)
    return maps


def first_order(sites: Sequence[Site], predict: Predict, images: Tensor, labels: Tensor) -> Tensor:
    """Return (L, H): the mean over images of |d loss / d gate| at a gate of 1 on every head; one backward pass."""
    gates = [torch.ones(len(images), site.heads, device=images.device, requires_grad=True) for site in sites]
    with torch.enable_grad(), scaled_heads(sites, lambda layer: gates[layer]):
        logits = predict(images).logits
        assert logits is not None
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
        found = torch.autograd.grad(loss, gates)
    return padded_stack([gradient.abs().mean(0) for gradient in found])
