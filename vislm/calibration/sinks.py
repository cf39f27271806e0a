"""Sink dimensions: where in the hidden state the first token's activation is massive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vislm.calibration.journal import Journal
from vislm.calibration.samples import Sample
from vislm.errors import UsageError
from vislm.heads.var import FIRST_LAYER
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import EditStage, EditView, PrepareView
from vislm.lmm.model import LMM


@dataclass(frozen=True)
class FirstToken:
    """Notes the first valid token's normalised hidden state in front of every layer from the third on."""

    seen: list[Tensor] = field(default_factory=list)
    """(D,) |x_j| / RMS(x), one per layer and sample."""
    name = "first token"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return a stage that edits nothing."""
        layers = frozenset(range(FIRST_LAYER, len(adapter.layers)))
        look = EditStage(
            layers, self._edit_nothing, prepare=self._look, needs_hidden=True, every_sample=True, observes=True
        )
        return [look]

    def _edit_nothing(self, view: EditView) -> None:
        return None

    def _look(self, view: PrepareView) -> None:
        assert view.hidden is not None
        x = view.hidden[torch.arange(len(view.hidden)), view.keys.first].float()
        self.seen.extend((x.abs() * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).cpu())


def mean_activations(lmm: LMM, samples: Sequence[Sample], journal: Journal | None = None) -> Tensor:
    """Return the mean (D,) of the first token's |n_j| over samples and layers.

    Args:
        lmm: the model.
        samples: their answers and objects do not matter.
        journal: gets every sample's mean, and is asked for those that a killed search has left.

    Raises:
        UsageError: a model with too few layers to have sinks.
    """
    if len(lmm.adapter.layers) <= FIRST_LAYER:
        raise UsageError(f"sinks form behind layer {FIRST_LAYER - 1}; the model has {len(lmm.adapter.layers)} layers")
    means = []
    for number, sample in enumerate(samples):
        name = f"sample {number}"
        if journal is not None and name in journal.found:
            means.append(torch.tensor(journal.found[name]))
            continue
        watcher = FirstToken()
        with lmm.using(watcher):
            lmm.ask(sample.image, sample.question, max_new_tokens=1)
        means.append(torch.stack(watcher.seen).mean(0))
        if journal is not None:
            journal.add({name: means[-1].tolist()})
    return torch.stack(means).mean(0)


def find_dims(means: Tensor, tau: float) -> list[int]:
    """Return the dimensions, ascending, whose mean (D,) exceeds ``tau``.

    Raises:
        UsageError: there is none; the largest means are named.
    """
    dims = (means > tau).nonzero().flatten().tolist()
    if not dims:
        best = ", ".join(f"{dim}: {means[dim]:.3g}" for dim in means.topk(min(5, len(means))).indices.tolist())
        raise UsageError(f"no dimension's mean exceeds tau={tau}; the largest are {best}; give a lower --tau")
    return dims
