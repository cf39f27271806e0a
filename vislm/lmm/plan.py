"""Compiling interventions into one plan: who acts where, and whether they contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.calibration import calibration_stage
from vislm.lmm.interventions import (
    BiasStage,
    HeadStage,
    Intervention,
    LanguageStage,
    Positions,
    PromptStage,
    TowerMergeStage,
    TowerStage,
)


@dataclass
class Plan:
    """All stages by place; the integer beside a stage is the place of its owner in ``interventions``."""

    interventions: tuple[Intervention, ...]
    tower: dict[int, tuple[int, TowerStage]] = field(default_factory=dict)
    """Vision layer -> stage after it."""
    tower_merges: dict[int, tuple[int, TowerMergeStage]] = field(default_factory=dict)
    """Vision layer -> stage within it."""
    prompt: list[tuple[int, PromptStage]] = field(default_factory=list)
    language: dict[int, tuple[int, LanguageStage]] = field(default_factory=dict)
    """Decoder layer -> stage before it."""
    biases: list[tuple[int, BiasStage]] = field(default_factory=list)
    heads: list[tuple[int, HeadStage]] = field(default_factory=list)
    positions: Positions = "original"
    """Positions of the tokens that survive until the language model."""

    @property
    def drops_before_language(self) -> bool:
        """Whether the prompt becomes shorter."""
        return bool(self.tower or self.tower_merges or self.prompt)

    @property
    def watches_language(self) -> bool:
        """Whether decoder attention must be seen."""
        return bool(self.language or self.heads or self.biases)


def compile_plan(interventions: Sequence[Intervention], adapter: Adapter) -> Plan:
    """Ask every intervention for its stages and put them in their places.

    Raises:
        UsageError: something that is not an intervention.
        PlanConflict: two owners of one place, or a stage outside the model; both names are given.
    """
    for item in interventions:
        if isinstance(item, type) or not isinstance(item, Intervention):
            raise UsageError(
                f"{item!r} is not an intervention; give instances such as FlowCut(keep=64) or VHR(alpha=2.0)"
            )
    names = [item.name for item in interventions]
    for name in names:
        if names.count(name) > 1:
            raise PlanConflict(f"{name} was given twice; give it once, with the options you want")
    plan = Plan(tuple(interventions))
    wanted: dict[Positions, str] = {}
    for owner, item in enumerate(interventions):
        stages: list[object] = list(item.plan(adapter))
        if stages and getattr(item, "calibrate", False):
            stages.append(calibration_stage())
        for stage in stages:
            _place(plan, owner, stage, adapter)
            if isinstance(stage, (TowerStage, TowerMergeStage, PromptStage)):
                wanted.setdefault(stage.positions, item.name)
    if len(wanted) > 1:
        raise PlanConflict(
            f"{wanted['original']} wants original positions and {wanted['contiguous']} contiguous ones for the tokens "
            "before the language model; set positions= of one of them"
        )
    for positions in wanted:
        plan.positions = positions
    _check_tower_signals(plan)
    return plan


def _check_tower_signals(plan: Plan) -> None:
    """Raise ``PlanConflict`` when one method wants to see the whole tower and another one thins it."""
    watchers = [o for o, s in plan.prompt if s.tower or s.needs_tower]
    thinners = [o for o, _ in (*plan.tower.values(), *plan.tower_merges.values())]
    if watchers and thinners:
        thinning = plan.interventions[thinners[0]].name
        raise PlanConflict(
            f"{plan.interventions[watchers[0]].name} needs the whole vision tower's signals, but {thinning} prunes it"
        )


def _place(plan: Plan, owner: int, stage: object, adapter: Adapter) -> None:
    name = plan.interventions[owner].name
    depth = len(adapter.layers)
    if isinstance(stage, TowerStage):
        _claim(plan, plan.tower, stage.after_layer, owner, stage, "the vision tower after layer")
        _check_one_thins_the_tower(plan)
    elif isinstance(stage, TowerMergeStage):
        if stage.layer > adapter.read_layer:
            raise PlanConflict(
                f"{name} merges in vision layer {stage.layer}, but the language model reads layer {adapter.read_layer}"
            )
        _claim(plan, plan.tower_merges, stage.layer, owner, stage, "the vision tower in layer")
        _check_one_thins_the_tower(plan)
    elif isinstance(stage, PromptStage):
        if plan.prompt:
            raise PlanConflict(f"{plan.interventions[plan.prompt[0][0]].name} and {name} both prune the prompt")
        plan.prompt.append((owner, stage))
    elif isinstance(stage, LanguageStage):
        signal = stage.before_layer if stage.signal_layer is None else stage.signal_layer
        if not 0 <= signal <= stage.before_layer < depth:
            raise PlanConflict(
                f"{name} prunes before decoder layer {stage.before_layer} with a signal of layer {stage.signal_layer}; "
                f"the model has layers 0..{depth - 1}, and the signal must come from an earlier one or the same"
            )
        early = signal < stage.before_layer
        if early and any(s.signal_layer == signal < s.before_layer for _, s in plan.language.values()):
            raise PlanConflict(f"two stages take their signal from decoder layer {signal}")
        _claim(plan, plan.language, stage.before_layer, owner, stage, "the language model before layer")
    elif isinstance(stage, BiasStage):
        plan.biases.append((owner, stage))
    elif isinstance(stage, HeadStage):
        outside = sorted(n for n in stage.layers if not 0 <= n < depth)
        if outside:
            raise PlanConflict(f"{name} scales heads of decoder layers {outside}; the model has layers 0..{depth - 1}")
        modes = {s.text_only for _, s in plan.heads if s.text_only != "no"} | {stage.text_only} - {"no"}
        if len(modes) > 1:
            raise PlanConflict(f"{name} and another method need different text-only streams: {sorted(modes)}")
        plan.heads.append((owner, stage))
    else:
        raise UsageError(f"{name} returned {stage!r}, which is not a stage")


def _check_one_thins_the_tower(plan: Plan) -> None:
    owners = {o for o, _ in (*plan.tower.values(), *plan.tower_merges.values())}
    if len(owners) > 1:
        raise PlanConflict(f"{' and '.join(plan.interventions[o].name for o in sorted(owners))} both prune the tower")


def _claim(plan: Plan, places: dict, place: int, owner: int, stage: object, where: str) -> None:
    if place in places:
        first = plan.interventions[places[place][0]].name
        raise PlanConflict(f"{first} and {plan.interventions[owner].name} both prune {where} {place}")
    places[place] = (owner, stage)
