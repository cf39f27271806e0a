"""How much a method changes a model: the last prompt token's hidden state, with and without it.

Source: the objective of VFlowOpt (Yang et al., ICCV 2025, arXiv 2508.05211), for any method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.lmm.interventions import Intervention
from vislm.lmm.model import LMM
from vislm.lmm.run import Run
from vislm.lmm.session import attach
from vislm.tuning.budget import Cost
from vislm.tuning.samples import Sample


@dataclass(frozen=True)
class Evaluation:
    """A method on a calibration set, on average over its samples."""

    discrepancy: float
    """1 - cosine + kl_weight kl."""
    cosine: float
    """Of the last token's last-layer hidden states; a NaN counts as 0."""
    kl: float
    """KL divergence in nats of the first answer token's distribution, from the full model's to the pruned one's."""
    cost: Cost

    def row(self) -> dict[str, float]:
        """Return its numbers by name."""
        figures = asdict(self)
        return {**{k: v for k, v in figures.items() if k != "cost"}, **figures["cost"]}


@dataclass(frozen=True)
class State:
    """What the model knows at the end of a prompt."""

    hidden: Tensor
    """(C,) float32, on the CPU."""
    log_probs: Tensor
    """(V,) float32, on the CPU."""


class Calibration:
    """A model, its calibration samples, and what it makes of them without pruning (computed once)."""

    def __init__(self, lmm: LMM, samples: Sequence[Sample], kl_weight: float = 0.0) -> None:
        self.lmm, self.samples, self.kl_weight = lmm, list(samples), kl_weight
        self._inputs = [lmm.prepare([sample.image], [sample.question]) for sample in self.samples]
        runs = [self._run(number) for number in range(len(self.samples))]
        self._full = [state for state, _ in runs]
        self.full_cost = Cost.mean([Cost.of(run) for _, run in runs])

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.lmm.adapter.layers)

    def cost(self, method: Intervention, samples: int) -> Cost:
        """Return what the method costs on the first ``samples`` samples."""
        return Cost.mean([Cost.of(self._run(number, method)[1]) for number in range(min(samples, len(self.samples)))])

    def evaluate(self, method: Intervention) -> Evaluation:
        """Return how much the method changes the model, and what it costs.

        Raises:
            UsageError: the method cannot act on this model with these options.
        """
        runs = [self._run(number, method) for number in range(len(self.samples))]
        pairs = list(zip(self._full, (state for state, _ in runs), strict=True))
        cosine = sum(_cosine(full.hidden, state.hidden) for full, state in pairs) / len(pairs)
        kl = sum(_kl(full.log_probs, state.log_probs) for full, state in pairs) / len(pairs)
        return Evaluation(1.0 - cosine + self.kl_weight * kl, cosine, kl, Cost.mean([Cost.of(run) for _, run in runs]))

    @torch.no_grad()
    def _run(self, number: int, *methods: Intervention) -> tuple[State, Run]:
        """Prefill one sample by itself, so that no padding enters its cost."""
        model: Any = self.lmm.model
        seen: list[Tensor] = []
        hook = self.lmm.adapter.language_model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state[0, -1])
        )
        with hook, attach(model, *methods) as session, warnings.catch_warnings():
            # a search visits corners that methods warn of
            warnings.filterwarnings("ignore", module=r"vislm\.token_pruning")
            session.questions = [self.samples[number].question]
            logits = model(**self._inputs[number], logits_to_keep=1).logits[0, -1]
            run = session.last_run
        assert run is not None
        return State(seen[-1].float().cpu(), logits.float().log_softmax(-1).cpu()), run


def _cosine(full: Tensor, pruned: Tensor) -> float:
    value = torch.nn.functional.cosine_similarity(full, pruned, dim=0).item()
    return 0.0 if math.isnan(value) else value


def _kl(full: Tensor, pruned: Tensor) -> float:
    """Return sum p (ln p - ln q); what is not finite counts as much as a uniform q would at worst."""
    value = torch.nn.functional.kl_div(pruned, full, reduction="sum", log_target=True).item()
    return value if math.isfinite(value) else math.log(len(full))
