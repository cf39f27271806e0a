"""How long methods take to choose: a plan whose deciding functions stop the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vislm.lmm.plan import Plan
from vislm.lmm.state import SessionState

_DECIDING = ("signal", "select", "match", "see")


def timed_plan(plan: Plan, state: SessionState) -> Plan:
    """Return the plan with every dropping or merging stage's functions adding their time to the run's "scoring"."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with state.scoring():
                return function(*args, **kwargs)

        return call

    def stage_of(owner: int, stage: Any) -> tuple[int, Any]:
        changes: dict[str, Any] = {name: timed(getattr(stage, name)) for name in _DECIDING if hasattr(stage, name)}
        if hasattr(stage, "tower"):
            changes["tower"] = {name: replace(s, signal=timed(s.signal)) for name, s in stage.tower.items()}
        return owner, replace(stage, **changes)

    return replace(
        plan,
        tower={layer: stage_of(*entry) for layer, entry in plan.tower.items()},
        tower_merges={layer: stage_of(*entry) for layer, entry in plan.tower_merges.items()},
        prompt=[stage_of(*entry) for entry in plan.prompt],
        language={layer: stage_of(*entry) for layer, entry in plan.language.items()},
    )
