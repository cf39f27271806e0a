"""How much a prediction changes: five measures of a head's importance, and how alike they rank.

The questions are those of Li et al. (arXiv 2303.13731), the definitions ours. The first-order proxy is that of
Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019, arXiv 1905.10650.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("probability_drop", "js_divergence", "accuracy_drop", "feature_change", "loss_increase")
"""Without the head: mean loss of the true class's probability; Jensen-Shannon divergence of the class distributions
(nats); loss of accuracy; 1 - cosine of the features in front of the classifier; increase of cross-entropy."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of n samples."""

    logits: Tensor | None
    """(n, classes); None of a model without classifier."""
    features: Tensor
    """(n, C) in front of the classifier."""

    def __getitem__(self, part: slice) -> Prediction:
        """Return a part of the samples."""
        return Prediction(None if self.logits is None else self.logits[part], self.features[part])


def effects(base: Prediction, without: Prediction, labels: Tensor | None) -> dict[str, Tensor]:
    """Return metric -> (n,): how each sample's prediction changes without a head.

    Args:
        base: of the whole model.
        without: of the model without the head.
        labels: (n,) true classes.
    """
    one, other = base.features.double(), without.features.double()
    found = {"feature_change": 1.0 - torch.nn.functional.cosine_similarity(one, other, dim=-1)}
    if base.logits is None or without.logits is None or labels is None:
        return found
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (base.logits, without.logits))
    own = labels.to(log_p.device)[:, None]
    true_p, true_q = log_p.gather(1, own)[:, 0], log_q.gather(1, own)[:, 0]
    right = [(log.argmax(-1) == own[:, 0]).double() for log in (log_p, log_q)]
    return {
        "probability_drop": true_p.exp() - true_q.exp(),
        "js_divergence": js_divergence(log_p, log_q),
        "accuracy_drop": right[0] - right[1],
        **found,
        "loss_increase": true_p - true_q,
    }


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (...) in nats of log-probabilities (..., classes), which may be -inf."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
    one, other = (torch.where(log.isneginf(), 0.0, log.exp() * (log - middle)).sum(-1) for log in (log_p, log_q))
    return 0.5 * (one + other)


def ranks(values: Tensor) -> Tensor:
    """Return the ranks (n,) of values, from 1; equal ones share their mean rank."""
    flat = values.double()
    below = (flat[:, None] > flat[None]).sum(1)
    equal = (flat[:, None] == flat[None]).sum(1)
    return below + 0.5 * (equal + 1).double()


def rank_correlation(maps: dict[str, Tensor]) -> Tensor:
    """Return (M, M): Spearman's correlation between head maps (L, H), over heads that all of them know.

    NaN where a map is constant.
    """
    flat = torch.stack([value.flatten().double() for value in maps.values()])
    flat = flat[:, flat.isfinite().all(0)]
    ranked = torch.stack([ranks(row) for row in flat])
    centred = ranked - ranked.mean(1, keepdim=True)
    size = centred.norm(dim=1)
    return centred @ centred.T / (size[:, None] * size).where(size[:, None] * size > 0, torch.nan)
