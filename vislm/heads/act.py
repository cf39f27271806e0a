"""ACT: in chosen heads, take attention from sinks in the middle of the prompt and give it to all other tokens.

Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training
through Attention Calibration", ICML 2024, arXiv 2406.15765; github.com/GATECH-EIC/ACT. The released code handles one
prompt and its prefill; here padding is not counted, and later rows use the prefill's sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels import StatisticsRequest
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import Heads, head_list
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.known_keys import follow
from vislm.lmm.interventions import EditStage, EditView, PrepareView

Spared = Literal["first_found", "first_token"]


def mean_received(received: Tensor, valid: Tensor) -> Tensor:
    """Return m (B, H, T): what a key receives on average from the rows that can see it, itself and later ones.

    Args:
        received: (B, H, T) causal attention of the valid rows, summed over them.
        valid: (B, T) bool, False on padding.
    """
    behind = valid.flip(-1).cumsum(-1).flip(-1)
    return received / behind.clamp(min=1)[:, None]


def sink_keys(mean: Tensor, valid: Tensor, threshold: float, spare: Spared = "first_found") -> Tensor:
    """Return (B, H, T) bool: keys with a mean above ``threshold``, the spared one left out.

    Args:
        mean: (B, H, T) of :func:`mean_received`.
        valid: (B, T) bool.
        threshold: of the mean attention.
        spare: "first_found" spares each head's first sink, as the code does, even where that is not the first token;
            "first_token" spares that token alone, which is meant.
    """
    sinks = (mean > threshold) & valid[:, None]
    order = sinks if spare == "first_found" else valid[:, None].expand_as(sinks)
    return sinks & (order.cumsum(-1) > 1)


def calibrate(weights: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """Return weights (B, H, R, K) in which sinks keep ``beta`` of theirs, and all other keys share what is freed.

    They share in proportion to their own weights, so that row sums stay; rows with nothing on others are left alone.

    Args:
        weights: after the softmax.
        sinks: (B, H, K) bool.
        beta: fraction that stays.
    """
    sinks = sinks[:, :, None]
    on_sinks = torch.where(sinks, weights, 0.0).sum(-1, keepdim=True)
    others = torch.where(sinks, 0.0, weights).sum(-1, keepdim=True)
    factor = 1.0 + (1.0 - beta) * on_sinks / others.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(others > 0.0, weights * torch.where(sinks, beta, factor), weights)


def received_by(call: AttentionCall, heads: Sequence[int], rows: Tensor) -> Tensor:
    """Return the attention (B, H', Nk) that keys receive from ``rows`` (B, Nq) bool in some heads, piece by piece."""
    share, mask = call.query.shape[1] // call.key.shape[1], call.mask
    chosen, groups = list(heads), [head // share for head in heads]
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, chosen]
    own = replace(call, query=call.query[:, chosen], key=call.key[:, groups], value=call.value[:, groups], mask=mask)
    received = own.statistics(StatisticsRequest(received=rows)).received
    assert received is not None
    return received


def remember_sinks(view: PrepareView, heads: Sequence[int], threshold: float, spare: Spared) -> None:
    """Put the sinks (B, H', T) of a layer's heads into the view's memory, under "sinks"."""
    valid = view.keys.valid[:, : view.call.query.shape[2]]
    mean = mean_received(received_by(view.call, heads, valid)[..., : valid.shape[1]], valid)
    view.memory.setdefault("sinks", {})[view.layer] = sink_keys(mean, valid, threshold, spare)


@dataclass(frozen=True)
class ACT:
    """Calibrate all rows of the listed heads at the prefill and every later row, also without an image."""

    heads: str | Heads | None = None
    """An artefact of kind "heads", or (layer, head) pairs; required, an empty list changes nothing."""
    beta: float = 0.4
    """Fraction of its attention that a sink keeps."""
    threshold: float = 0.1
    """Mean attention above which a key is a sink: absolute, as in the code; the paper compares with 1 / T."""
    spare: Spared = "first_found"
    """Which sink is left alone: the first that is found, as in the code, or none but the first token."""
    name = "act"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none for an empty list or beta 1."""
        if self.heads is None:
            raise UsageError(
                "act needs heads=, found for this model: a file of vislm calibrate-heads --what act, or pairs such as "
                "2/3+5/1"
            )
        for name, value in (("beta", self.beta), ("threshold", self.threshold)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name}={value}: expected a share between 0 and 1")
        heads = head_list(self.heads, adapter, ("act",))
        if not heads or self.beta == 1.0:
            return []

        def prepare(view: PrepareView) -> None:
            remember_sinks(view, heads[view.layer], self.threshold, self.spare)

        listed = EditStage(frozenset(heads), self.edit, "all", lambda layer: heads[layer], prepare, every_sample=True)
        return [listed]

    def edit(self, view: EditView) -> Tensor | None:
        """Return the rows' weights (B, H', R, K), or None where there are no sinks."""
        sinks = view.memory["sinks"][view.layer]
        if not bool(sinks.any()):
            return None
        weights = view.softmax()
        return calibrate(weights, follow(sinks, weights.shape[0], weights.shape[-1]), self.beta)


METHOD = ACT
