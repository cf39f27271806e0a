"""What a plan will cost, before anything runs: tokens in every layer, FLOPs, key-value bytes.

The counts come from the stages' own ``expected``; where they depend on the image, they are estimates, and say what they
assume. A run of the same prompt reports the same numbers (``Run``), measured ones beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.cost.flops import DecoderShape
from vislm.lmm.interventions import Alive, Intervention, PromptStage
from vislm.lmm.plan import Plan, compile_plan
from vislm.lmm.prompt.image_layout import ImageLayout

TEXT_TOKENS = 60
"""Words around an image in published figures (58-60 for LLaVA-1.5)."""


@dataclass(frozen=True)
class Expectation:
    """Counts of one prompt with one image."""

    image_tokens: int
    """Visual tokens that the untouched model would see."""
    text_tokens: int
    tower_tokens: list[int]
    """Patches that enter each tower layer, of all crops."""
    visual_tokens: list[int]
    """Visual tokens that enter each decoder layer."""
    flops: dict[str, int]
    """"tower" and "projector", "prefill" (logits of the last column included), "decode" (one step behind it)."""
    kv_bytes: int
    """Key-value cache behind the prefill."""
    bytes_per_value: int
    assumptions: tuple[str, ...] = ()
    """What the counts take for granted; empty: they are exact."""

    @property
    def columns(self) -> list[int]:
        """Columns that enter each decoder layer = keys that it caches."""
        return [self.text_tokens + n for n in self.visual_tokens]

    @property
    def total_flops(self) -> int:
        """FLOPs until the first answer token: tower, projector and prefill."""
        return self.flops["tower"] + self.flops["projector"] + self.flops["prefill"]

    @property
    def average_tokens(self) -> float:
        """Visual tokens, on average over the decoder layers: the budget of many papers."""
        return sum(self.visual_tokens) / len(self.visual_tokens)

    def saving(self, full: Expectation) -> float:
        """Return 1 - F / F0 against the untouched model: the theoretical saving until the first answer token."""
        return 1.0 - self.total_flops / full.total_flops


def expect(
    adapter: Adapter,
    interventions: Sequence[Intervention],
    layout: ImageLayout,
    text_tokens: int = TEXT_TOKENS,
    bytes_per_value: int = 2,
) -> Expectation:
    """Count what a prompt of one image and ``text_tokens`` other columns costs under interventions.

    Args:
        adapter: of the model; weights are not needed (``blank_model``).
        interventions: pruning methods; what others do costs nothing here.
        layout: the image.
        text_tokens: columns that are no visual tokens, markers between tiles included.
        bytes_per_value: of the cache: 2 in 16 bit.

    Raises:
        UsageError: no text at all.
        PlanConflict: methods that contradict each other or the model.
    """
    if text_tokens < 1:
        raise UsageError(f"text_tokens={text_tokens}: a prompt has at least one word behind its image")
    counter = _Counter(adapter, compile_plan(interventions, adapter), layout)
    tower, projected = counter.tower()
    visual = counter.language(counter.prompt())
    shape, decoder = adapter.tower_shape, DecoderShape.of(adapter.text_config)
    columns = [text_tokens + n for n in visual]
    projector = shape.projector_flops(projected)
    flops = {
        "tower": shape.batch_flops(tower.attending, layout.patches, projected, tower.fed) - projector,
        "projector": projector,
        "prefill": decoder.prefill_flops(columns),
        "decode": decoder.decode_flops([n + 1 for n in columns]),
    }
    return Expectation(
        image_tokens=layout.tokens,
        text_tokens=text_tokens,
        tower_tokens=[sum(layer) - len(layer) * shape.prefix for layer in tower.attending],
        visual_tokens=visual,
        flops=flops,
        kv_bytes=decoder.kv_bytes(columns, bytes_per_value),
        bytes_per_value=bytes_per_value,
        assumptions=tuple(counter.assumptions),
    )


@dataclass
class _Tower:
    attending: list[list[int]]
    """For every layer the tokens that attend to each other."""
    fed: list[int]
    """For every layer the tokens that its MLP sees."""


class _Counter:
    """Walks through a plan with the counts of one image."""

    def __init__(self, adapter: Adapter, plan: Plan, layout: ImageLayout) -> None:
        self.adapter, self.plan, self.layout = adapter, plan, layout
        self.assumptions: dict[str, None] = {}
        self.alive: list[int] = []

    def tower(self) -> tuple[_Tower, int]:
        """Return the tower's counts, and the tokens that the projector makes."""
        full, prefix = self.layout.segments, self.adapter.tower_prefix
        cell = self.adapter.tower_shape.cell
        if not self.plan.tower and not self.plan.tower_merges:
            return _Tower(full, [sum(layer) for layer in full]), self.layout.patches // cell
        first = [n - prefix for n in full[0]]
        self.alive = list(first)
        counts = _Tower([], [])
        for layer in range(len(full)):
            counts.attending.append([n + prefix for n in self.alive])
            self._in_tower(self.plan.tower_merges.get(layer), first)
            counts.fed.append(sum(self.alive) + prefix * len(self.alive))
            self._in_tower(self.plan.tower.get(layer), first)
        return counts, sum(self.alive) // cell

    def _in_tower(self, stage: tuple[int, Any] | None, first: list[int]) -> None:
        """Let a stage drop or merge patches of every crop, of which there were ``first``."""
        if stage is not None:
            self.alive = [self._ask(*stage, Alive(n, total)) for n, total in zip(self.alive, first, strict=True)]

    def prompt(self) -> int:
        """Return the visual tokens that enter the language model."""
        layout = self.layout
        alive = Alive(layout.tokens, layout.tokens, crops=layout.crops, grids=layout.grids)
        if self.alive and sum(self.alive) < layout.patches:
            alive = self._thinned()
        for owner, stage in self.plan.prompt:
            if isinstance(stage, PromptStage):
                return self._ask(owner, stage, alive)
        return alive.tokens

    def _thinned(self) -> Alive:
        """Return what the tower has left, in tokens; separators of a thinned grid go."""
        layout = self.layout
        if not layout.mixed:
            left = sum(self.alive) // self.adapter.tower_shape.cell
            return Alive(left, layout.tokens, crops=(left,))
        self.assumptions["the tower drops as large a part of the padding between tiles as of the image"] = None
        share = sum(self.alive) / layout.patches
        crops = tuple(round(n * share) for n in layout.crops)
        return Alive(sum(crops), layout.tokens, crops=crops)

    def language(self, tokens: int) -> list[int]:
        """Return the visual tokens that enter every decoder layer, from those that enter the first."""
        first: dict[int, int] = {}
        counts = []
        for layer in range(len(self.adapter.layers)):
            if layer in self.plan.language:
                owner, stage = self.plan.language[layer]
                first.setdefault(owner, tokens)
                tokens = self._ask(owner, stage, Alive(tokens, self.layout.tokens, first[owner]))
            counts.append(tokens)
        return counts

    def _ask(self, owner: int, stage: Any, alive: Alive) -> int:
        name = self.plan.interventions[owner].name
        if stage.expected is None:
            self.assumptions[f"{name} does not say how many tokens it leaves; all are counted"] = None
            return alive.tokens
        if stage.assumes:
            self.assumptions[f"{name}: {stage.assumes}"] = None
        return max(0, min(alive.tokens, stage.expected(alive)))
