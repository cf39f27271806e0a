"""Figures of one method at one budget against the untouched model, and whether they are good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vislm.bench.pruning.cases import Measured
from vislm.report.tables import Cell

TARGETS = {"prefill": 0.95, "all": 0.90, "scoring": 0.03}
"""Least shares of the saving that are realised, in the prefill and until the first word; most that scoring may take of
the unpruned prefill."""


PHASES = ("tower", "prompt", "prefill")


def _least(rounds: Sequence[Measured]) -> float:
    """Return the time from pixels to the first word when nothing disturbs: the least of every phase and of the rest."""
    phases = sum(min(m.run.seconds[phase] for m in rounds) for phase in PHASES)
    return phases + min(m.seconds - sum(m.run.seconds[phase] for phase in PHASES) for m in rounds)


@dataclass(frozen=True)
class Row:
    """What was measured; seconds are the least of all rounds, phase by phase; the untouched model took part."""

    method: str
    keep: float
    visual_tokens: float
    """On average over the decoder layers."""
    prefill: float
    full_prefill: float
    total: float
    """From pixels to the first word."""
    full_total: float
    scoring: float
    prefill_flops: float
    """Share that is left."""
    total_flops: float
    kv_bytes: int
    kv_exact: bool
    full_kv_bytes: int
    peak: int | None
    full_peak: int | None
    short_prompt: float | None = None
    """Share of its own saving that a plain prompt realises with as many words as the budget leaves: what the machine
    allows."""
    field: float | None = None
    """Time until the first word of FastV at this budget as the field runs it, over that of the untouched model."""

    @classmethod
    def of(cls, method: str, keep: float, ours: list[Measured], full: list[Measured], **more: float | None) -> Row:
        """Put together the rounds of a method and those of the untouched model beside them."""
        run, whole = ours[-1].run, full[-1].run
        visual = sum(run.visual_tokens)
        text = run.prompt_tokens - visual
        return cls(
            method=method,
            keep=keep,
            visual_tokens=sum(n - text for n in run.layer_tokens) / len(run.layer_tokens),
            prefill=min(m.run.seconds["prefill"] for m in ours),
            full_prefill=min(m.run.seconds["prefill"] for m in full),
            total=_least(ours),
            full_total=_least(full),
            scoring=min(m.run.seconds["scoring"] for m in ours),
            prefill_flops=run.flops["prefill"] / whole.flops["prefill"],
            total_flops=(run.flops["tower"] + run.flops["prefill"]) / (whole.flops["tower"] + whole.flops["prefill"]),
            kv_bytes=run.kv_bytes,
            kv_exact=run.kv_bytes == run.kv_bytes_expected,
            full_kv_bytes=whole.kv_bytes,
            peak=run.peak_bytes,
            full_peak=whole.peak_bytes,
            **more,
        )

    @property
    def realised_prefill(self) -> float:
        """(1 - t / t0) / (1 - F / F0) of the prefill."""
        return (1 - self.prefill / self.full_prefill) / (1 - self.prefill_flops)

    @property
    def realised_total(self) -> float:
        """The same from pixels to the first word: tower, scoring and all bookkeeping."""
        return (1 - self.total / self.full_total) / (1 - self.total_flops)

    @property
    def scoring_share(self) -> float:
        """Scoring time over the unpruned prefill."""
        return self.scoring / self.full_prefill

    def shares(self) -> dict[str, float]:
        """Return the three shares that have targets."""
        return {
            "realised_prefill": self.realised_prefill,
            "realised_total": self.realised_total,
            "scoring_share": self.scoring_share,
        }

    def misses(self) -> list[str]:
        """Return what is worse than the targets."""
        found = []
        if self.realised_prefill < TARGETS["prefill"]:
            found.append(f"realised in the prefill {self.realised_prefill:.1%}")
        if self.realised_total < TARGETS["all"]:
            found.append(f"realised until the first word {self.realised_total:.1%}")
        if self.scoring_share > TARGETS["scoring"]:
            found.append(f"scoring {self.scoring_share:.1%}")
        if not self.kv_exact:
            found.append("key-value bytes are not as counted")
        return found

    def cells(self) -> dict[str, Cell]:
        """Return the row of the printed table."""
        return {
            "method": self.method,
            "keep": f"{self.keep:.0%}",
            "tokens": f"{self.visual_tokens:.0f}",
            "prefill ms": f"{self.prefill * 1e3:.0f}",
            "of full": f"{self.prefill / self.full_prefill:.1%}",
            "FLOPs": f"{self.prefill_flops:.1%}",
            "realised": f"{self.realised_prefill:.1%}",
            "plain prompt": "-" if self.short_prompt is None else f"{self.short_prompt:.1%}",
            "first word": f"{self.realised_total:.1%}",
            "scoring": f"{self.scoring_share:.2%}",
            "KV MiB": f"{self.kv_bytes / 2**20:.1f}",
            "of full KV": f"{self.kv_bytes / self.full_kv_bytes:.1%}",
            "peak MiB": "-" if self.peak is None else f"{self.peak / 2**20:.0f}",
            "field/ours": "-" if self.field is None else f"{self.field * self.full_total / self.total:.2f}x",
        }
