"""The methods and budgets that the demonstration compares."""

from __future__ import annotations

from dataclasses import dataclass

from vislm import registry
from vislm.lmm.interventions import Intervention

TOKENS = 64
"""Visual tokens of the embedded model."""
BUDGETS = (32, 16, 8)
PRUNING = ("random", "fastv", "flowcut")
VHR = "vhr:alpha=1.5"


@dataclass(frozen=True)
class Setting:
    """One row of the demonstration's table. ``method`` joins the budgets of one pruning method to a curve."""

    label: str
    method: str
    keep: int
    interventions: tuple[Intervention, ...] = ()

    @property
    def pruned_only(self) -> bool:
        """Whether this is a pruning method by itself."""
        return self.method in PRUNING


def settings() -> list[Setting]:
    """Return the untouched model, every pruning method at every budget, VHR, and both kinds together."""
    rows = [Setting(f"all {TOKENS} tokens", "none", TOKENS)]
    rows += [
        Setting(f"{method}, {keep}", method, keep, (registry.build("pruning", f"{method}:keep={keep}"),))
        for keep in BUDGETS
        for method in PRUNING
    ]
    heads = registry.build("heads", VHR)
    rows.append(Setting(f"VHR, {TOKENS}", "vhr", TOKENS, (heads,)))
    rows += [
        Setting(
            f"flowcut + VHR, {keep}", "flowcut+vhr", keep, (registry.build("pruning", f"flowcut:keep={keep}"), heads)
        )
        for keep in BUDGETS[:2]
    ]
    return rows
