"""Compiling interventions into one plan: who acts where, and whether they contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.calibration import calibration_stage
from vislm.lmm.interventions import (
    BiasStage,
    EditStage,
    HeadStage,
    Intervention,
    LanguageStage,
    LogitsStage,
    Positions,
    ProbeStage,
    PromptStage,
    SearchStage,
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
    prompt: list[tuple[int, PromptStage | ProbeStage]] = field(default_factory=list)
    """At most one that drops or merges, behind those that only look."""
    language: dict[int, tuple[int, LanguageStage]] = field(default_factory=dict)
    """Decoder layer -> stage before it."""
    biases: list[tuple[int, BiasStage]] = field(default_factory=list)
    edits: list[tuple[int, EditStage]] = field(default_factory=list)
    heads: list[tuple[int, HeadStage]] = field(default_factory=list)
    logits: list[tuple[int, LogitsStage]] = field(default_factory=list)
    search: list[tuple[int, SearchStage]] = field(default_factory=list)
    """At most one."""
    positions: Positions = "original"
    """Positions of the tokens that survive until the language model."""

    @property
    def drops_before_language(self) -> bool:
        """Whether the prompt becomes shorter."""
        return bool(self.tower or self.tower_merges or self.prompt)

    @property
    def watches_language(self) -> bool:
        """Whether decoder attention must be seen."""
        return bool(self.language or self.heads or self.biases or self.edits)


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
    _check_tower_signals(plan, adapter)
    _check_search(plan)
    return plan


def _check_tower_signals(plan: Plan, adapter: Adapter) -> None:
    """Raise ``PlanConflict`` when one method wants to see the whole tower and another one thins it."""
    for _, stage in plan.prompt:
        for signal in stage.tower.values():
            adapter.check_tower_signal(signal.layer)
    everything = [o for o, s in plan.prompt if isinstance(s, ProbeStage) and s.all_tokens]
    droppers = [o for o, s in (*plan.prompt, *plan.language.values()) if not isinstance(s, ProbeStage)]
    droppers += [o for o, _ in (*plan.tower.values(), *plan.tower_merges.values())]
    if everything and droppers:
        raise PlanConflict(
            f"{plan.interventions[everything[0]].name} speaks of single image tokens, which "
            f"{plan.interventions[droppers[0]].name} may have pruned away"
        )
    watchers = [o for o, s in plan.prompt if s.tower or s.needs_tower]
    thinners = [o for o, _ in (*plan.tower.values(), *plan.tower_merges.values())]
    if watchers and thinners:
        thinning = plan.interventions[thinners[0]].name
        raise PlanConflict(
            f"{plan.interventions[watchers[0]].name} needs the whole vision tower's signals, but {thinning} prunes it"
        )


def _check_search(plan: Plan) -> None:
    """Raise ``PlanConflict`` when one method keeps a record of every token, and another takes tokens back."""
    for searching, _ in plan.search:
        for owner, stage in plan.edits:
            if owner != searching and (stage.by_row or stage.observes or stage.draft):
                raise PlanConflict(
                    f"{plan.interventions[owner].name} keeps a record of every token, and "
                    f"{plan.interventions[searching].name} looks ahead and takes tokens back; use one of them"
                )


def _place(plan: Plan, owner: int, stage: object, adapter: Adapter) -> None:
    name = plan.interventions[owner].name
    depth = len(adapter.layers)
    if isinstance(stage, (TowerStage, TowerMergeStage)) and adapter.tower_conflict:
        raise PlanConflict(f"{name} cannot act inside the vision tower: {adapter.tower_conflict}")
    if isinstance(stage, TowerStage):
        _claim(plan, plan.tower, stage.after_layer, owner, stage, "the vision tower after layer")
        _check_one_thins_the_tower(plan)
    elif isinstance(stage, TowerMergeStage):
        if adapter.packed_tower:
            raise PlanConflict(
                f"{name} merges patches of a rectangular batch, but the tower of {adapter.family} runs all images as "
                "one sequence; drop whole cells instead (flowcut)"
            )
        if stage.layer > adapter.read_layer:
            raise PlanConflict(
                f"{name} merges in vision layer {stage.layer}, but the language model reads layer {adapter.read_layer}"
            )
        _claim(plan, plan.tower_merges, stage.layer, owner, stage, "the vision tower in layer")
        _check_one_thins_the_tower(plan)
    elif isinstance(stage, PromptStage):
        first = next((o for o, s in plan.prompt if isinstance(s, PromptStage)), None)
        if first is not None:
            raise PlanConflict(f"{plan.interventions[first].name} and {name} both prune the prompt")
        plan.prompt.append((owner, stage))
    elif isinstance(stage, ProbeStage):
        plan.prompt.insert(0, (owner, stage))
    elif isinstance(stage, LanguageStage):
        signal = stage.before_layer if stage.signal_layer is None else stage.signal_layer
        if not 0 <= signal <= stage.before_layer < depth:
            raise PlanConflict(
                f"{name} prunes before decoder layer {stage.before_layer} with a signal of layer {stage.signal_layer}; "
                f"the model has layers 0..{depth - 1}, and the signal must come from an earlier one or the same"
            )
        if stage.before_layer < adapter.deepstack:
            raise PlanConflict(
                f"{name} prunes before decoder layer {stage.before_layer}, but {adapter.family} adds "
                f"{adapter.deepstack} deepstack tensors of the full prompt behind layers 0..{adapter.deepstack - 1}; "
                f"prune before layer {adapter.deepstack} or a later one"
            )
        if "sliding_attention" in (getattr(adapter.text_config, "layer_types", None) or ()):
            raise PlanConflict(
                f"{name} prunes inside a language model with sliding windows, which count keys that are left; prune "
                "before the language model instead"
            )
        early = signal < stage.before_layer
        if early and any(s.signal_layer == signal < s.before_layer for _, s in plan.language.values()):
            raise PlanConflict(f"two stages take their signal from decoder layer {signal}")
        _claim(plan, plan.language, stage.before_layer, owner, stage, "the language model before layer")
    elif isinstance(stage, BiasStage):
        plan.biases.append((owner, stage))
    elif isinstance(stage, EditStage):
        _check_layers(name, "edits attention", stage.layers, depth)
        for other, first in plan.edits:
            shared = sorted(n for n in stage.layers & first.layers if _heads_meet(stage, first, n))
            if other != owner and shared and not stage.observes and not first.observes:
                raise PlanConflict(
                    f"{plan.interventions[other].name} and {name} both edit the attention of decoder layers {shared}; "
                    "give them different layers"
                )
        plan.edits.append((owner, stage))
    elif isinstance(stage, LogitsStage):
        _check_layers(name, "reads", frozenset(stage.early_layers), depth)
        if any(s.contrast != "none" for _, s in plan.logits) and stage.contrast != "none":
            first = next(o for o, s in plan.logits if s.contrast != "none")
            raise PlanConflict(f"{plan.interventions[first].name} and {name} both run a contrast stream")
        plan.logits.append((owner, stage))
    elif isinstance(stage, SearchStage):
        if plan.search:
            raise PlanConflict(f"{plan.interventions[plan.search[0][0]].name} and {name} are both decoding strategies")
        plan.search.append((owner, stage))
    elif isinstance(stage, HeadStage):
        _check_layers(name, "scales heads", stage.layers, depth)
        for other, first in plan.heads:
            if {stage.text_only, first.text_only} == {"both", "image_only"}:
                raise PlanConflict(
                    f"{plan.interventions[other].name} and {name} need different text-only streams, "
                    f"{first.text_only!r} and {stage.text_only!r}; give them the same text_stream="
                )
        plan.heads.append((owner, stage))
    else:
        raise UsageError(f"{name} returned {stage!r}, which is not a stage")


def _check_one_thins_the_tower(plan: Plan) -> None:
    owners = {o for o, _ in (*plan.tower.values(), *plan.tower_merges.values())}
    if len(owners) > 1:
        raise PlanConflict(f"{' and '.join(plan.interventions[o].name for o in sorted(owners))} both prune the tower")


def _check_layers(name: str, what: str, layers: frozenset[int], depth: int) -> None:
    outside = sorted(n for n in layers if not 0 <= n < depth)
    if outside:
        raise PlanConflict(f"{name} {what} of decoder layers {outside}; the model has layers 0..{depth - 1}")


def _heads_meet(one: EditStage, other: EditStage, layer: int) -> bool:
    if one.heads is None or other.heads is None:
        return True
    return bool(set(one.heads(layer)) & set(other.heads(layer)))


def _claim(plan: Plan, places: dict, place: int, owner: int, stage: object, where: str) -> None:
    if place in places:
        first = plan.interventions[places[place][0]].name
        raise PlanConflict(f"{first} and {plan.interventions[owner].name} both prune {where} {place}")
    places[place] = (owner, stage)
