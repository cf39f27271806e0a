"""OPERA: beam search that penalises tokens which lean on one earlier token of the answer, and goes back where it did.

Source: Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
Retrospection-Allocation", CVPR 2024, arXiv 2311.17911; github.com/shikiw/OPERA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import EditStage, EditView, SearchStage, SearchView

LOG_BASE = math.log(1e-7)
LARGEST = math.log(1e30)
"""Penalties end here: such a token is out of question, and larger ones would not be finite."""


def normalised_row(weights: Tensor) -> Tensor:
    """Return the maximum over heads of attention rows (B, H, K), divided by its sum, (B, K)."""
    row = weights.float().amax(1)
    return row / row.sum(-1, keepdim=True)


def longer_columns(columns: Tensor | None, row: Tensor, scale: float, window: int) -> Tensor:
    """Return the logarithms of the column products prod_{i >= j} (scale A_ij), (R, t), with one more row.

    Args:
        columns: (R, t - 1) before it; None at the first token of the answer.
        row: (R, t) the newest token's attention to the answer, itself included.
        scale: factor of every weight.
        window: columns older than this many tokens become -inf.
    """
    new = (scale * row).log()
    if columns is not None:
        new[:, :-1] += columns
    new[:, : max(0, row.shape[1] - window)] = -torch.inf
    return new


def over_trust(columns: Tensor) -> Tensor:
    """Return the penalty (R,): 1e-7 times the largest column product, of columns (R, t) in logarithms."""
    return (columns.amax(-1) + LOG_BASE).clamp(max=LARGEST).exp()


def summary_place(places: Tensor) -> tuple[int, int] | None:
    """Return where all answers (R, t) lean most often, and how often the rarest of them does; None if they differ."""
    found, counts = set(), []
    for row in places:
        values, number = row.unique(return_counts=True)
        found.add(int(values[number.argmax()]))
        counts.append(int(number.max()))
    return (found.pop(), min(counts)) if len(found) == 1 else None


@dataclass(frozen=True)
class OPERA:
    """Decode by OPERA's beam search, one sample at a time.

    With ``penalty_weight=0`` and ``threshold=None`` nothing is left of it, and the model decodes as its caller says.
    The efficient setting of the authors is ``candidates=1, threshold=25``.
    """

    num_beams: int = 5
    """Used unless ``generate`` is told otherwise."""
    candidates: int = 5
    """Tokens per beam that are looked ahead at; each costs one forward of one token per step."""
    choose_from: Literal["all", "candidates"] = "all"
    """"all": tokens that are no candidates keep their logits (code). "candidates": they are ruled out (paper)."""
    penalty_weight: float = 1.0
    scale_factor: float = 50.0
    threshold: int | None = 15
    """Go back when the answer has leaned on one place more often than this; None: never."""
    window_size: int = 512
    """Tokens of the answer that count."""
    image_steps: int = 10
    """For so many first tokens the penalty is minus the attention to the image; nothing goes back to them."""
    retries: int = 5
    """How often the search goes back to one place before it goes back one place further."""
    name = "opera"

    def plan(self, adapter: Adapter) -> Sequence[EditStage | SearchStage]:
        """Return a stage that sees the last layer's rows and the search; none when both effects are off."""
        counts = (self.num_beams, self.candidates, self.window_size, self.retries, self.scale_factor)
        if min(counts) <= 0 or self.image_steps < 0 or not 0.0 <= self.penalty_weight < math.inf:
            raise UsageError(f"{self}: expected positive numbers (penalty_weight, image_steps: >= 0)")
        if self.threshold is not None and self.threshold < 1:
            raise UsageError(f"threshold={self.threshold}: expected a number >= 1, or None")
        if self.choose_from == "candidates" and self.candidates < 2:
            raise UsageError("choose_from='candidates' with one candidate: all beams would be the same; use 'all'")
        if self.penalty_weight == 0.0 and self.threshold is None:
            return []
        last = frozenset({len(adapter.layers) - 1})
        return [
            EditStage(last, self._see, every_sample=True, observes=True),
            SearchStage(self._judge, self._read, self._go_back, self.num_beams),
        ]

    def _see(self, view: EditView) -> None:
        row = normalised_row(view.softmax()[:, :, -1])
        view.memory["answer_row"] = row[:, view.keys.prompt :]
        view.memory["image_mass"] = (row * view.keys.image).sum(-1)

    def _longer(self, view: SearchView) -> Tensor:
        return longer_columns(view.state.get("columns"), view.memory["answer_row"], self.scale_factor, self.window_size)

    def _judge(self, view: SearchView) -> Tensor:
        logits = view.logits.clone()
        if self.choose_from == "candidates":
            logits.fill_(-torch.inf)
        for words in view.logits.topk(self.candidates, dim=-1).indices.unbind(1):
            value = view.logits.gather(1, words[:, None])
            if self.penalty_weight:
                view.look(words)
                early = view.tokens.shape[1] < self.image_steps
                penalty = -view.memory["image_mass"] if early else over_trust(self._longer(view))
                value = value - self.penalty_weight * penalty[:, None]
            logits.scatter_(1, words[:, None], value)
        return logits

    def _read(self, view: SearchView) -> None:
        columns = self._longer(view)
        places = columns.argmax(-1, keepdim=True)
        before = view.state.get("places", places[:, :0])
        view.state.update(columns=columns, places=torch.cat([before, places], 1))

    def _go_back(self, view: SearchView) -> int | None:
        if self.threshold is None:
            return None
        found = summary_place(view.state["places"][:, -self.window_size :])
        if found is None or found[1] <= self.threshold:
            return None
        return self._place_to_go_back_to(found[0], view.tokens.shape[1], view.memory)

    def _place_to_go_back_to(self, place: int, length: int, memory: dict[str, Any]) -> int | None:
        """Return how many tokens stay: up to the place, or one before it for each ``retries`` times it was tried."""
        visits: dict[int, int] = memory.setdefault("went_back", {})
        if place < memory.get("furthest", 0):
            return None
        memory["furthest"] = place
        while visits.get(place, 0) >= self.retries:
            place -= 1
        if place < self.image_steps or place + 1 >= length:
            return None
        visits[place] = visits.get(place, 0) + 1
        return place + 1


METHOD = OPERA
