"""What a pruned run costs, what it may cost, and the ``keep`` that spends just that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vislm.errors import UsageError
from vislm.lmm.run import Run

SLACK = 0.01
"""Share by which a budget may be exceeded: the number of tokens is a whole number."""
ATTEMPTS = 6
SMALLEST_KEEP = 0.01


@dataclass(frozen=True)
class Cost:
    """What a run cost, as a share of the untouched model's."""

    tokens: float
    """Visual tokens, on average over the decoder layers, over those of the full prompt."""
    flops: float
    """FLOPs of tower and prefill."""
    average_tokens: float
    """Visual tokens of a prompt, on average over the decoder layers."""

    @classmethod
    def of(cls, run: Run) -> Cost:
        """Read it from the run of one prompt without padding.

        Raises:
            UsageError: a prompt without images.
        """
        visual = sum(run.visual_tokens)
        if not visual:
            raise UsageError("a calibration sample has no image; visual tokens cannot be counted")
        text = run.prompt_tokens - visual
        average = sum(columns - text for columns in run.layer_tokens) / len(run.layer_tokens)
        full = sum(flops for name, flops in run.flops.items() if name.startswith("full_"))
        spent = sum(flops for name, flops in run.flops.items() if not name.startswith("full_"))
        return cls(average / visual, spent / full, average)

    @classmethod
    def mean(cls, costs: Sequence[Cost]) -> Cost:
        """Return the mean of several."""
        n = len(costs)
        return cls(*(sum(getattr(c, f) for c in costs) / n for f in ("tokens", "flops", "average_tokens")))


@dataclass(frozen=True)
class Budget:
    """An upper bound of the cost."""

    kind: Literal["tokens", "flops"]
    value: int | float
    """A share in (0, 1], or for tokens a number of them."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget.

        ``0.25`` or ``tokens=0.25`` is a share of the visual tokens, on average over the decoder layers, ``tokens=64``
        their number, ``flops=0.4`` a share of the FLOPs of tower and prefill.

        Raises:
            UsageError: anything else.
        """
        kind, equals, number = text.strip().rpartition("=")
        kind = kind if equals else "tokens"
        try:
            value = int(number) if number.isdigit() and kind == "tokens" and number != "1" else float(number)
        except ValueError:
            value = 0.0
        share = isinstance(value, float)
        if kind not in ("tokens", "flops") or not value > 0 or (share and value > 1.0):
            raise UsageError(f"--budget {text!r}: expected a share such as 0.25, tokens=64 or flops=0.4")
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    def of(self, cost: Cost) -> float:
        """Return the quantity that is bounded."""
        if self.kind == "flops":
            return cost.flops
        return cost.tokens if isinstance(self.value, float) else cost.average_tokens

    def share(self, full: Cost) -> float:
        """Return the bound as a share of the full cost."""
        return min(1.0, self.value / self.of(full))

    def violation(self, cost: Cost) -> float:
        """Return by which share of it the budget is exceeded; 0 or less within it (and its slack)."""
        return self.of(cost) / (self.value * (1.0 + SLACK)) - 1.0


def solve_keep(cost: Callable[[float], float], share: float) -> float:
    """Return the ``keep`` ratio in (0, 1] whose cost comes closest to ``share`` from below.

    Interpolates between the nearest costs seen on either side; keep = 1 costs 1. If every keep tried costs too much,
    the cheapest is returned, so that the caller sees by how much.

    Args:
        cost: keep -> share of the full cost; grows with keep. May raise ``UsageError`` for a keep that cannot be had.
        share: the bound.
    """
    seen: dict[float, float] = {}
    keep = round(max(SMALLEST_KEEP, share), 4)
    for _ in range(ATTEMPTS):
        try:
            seen[keep] = cost(keep)
        except UsageError:
            if not seen:
                raise
            break
        if share * (1.0 - SLACK) <= seen[keep] <= share * (1.0 + SLACK):
            break
        keep = _next(seen, share)
        if keep in seen:
            break
    within = [k for k, c in seen.items() if c <= share * (1.0 + SLACK)]
    return max(within, key=lambda k: (seen[k], -k)) if within else min(seen, key=lambda k: seen[k])


def _next(seen: dict[float, float], share: float) -> float:
    points = {**seen, 1.0: 1.0}
    k1, c1 = min(((k, c) for k, c in points.items() if c > share), default=(1.0, 1.0))
    below = [(k, c) for k, c in points.items() if c <= share and k < k1]
    if below:
        k0, c0 = max(below)
    else:  # from the line through the two cheapest points
        k0, c0 = k1, c1
        k1, c1 = min(((k, c) for k, c in points.items() if k > k0), default=(1.0, 1.0))
    if c1 == c0:
        return k0
    return round(min(1.0, max(SMALLEST_KEEP, k0 + (share - c0) * (k1 - k0) / (c1 - c0))), 4)
