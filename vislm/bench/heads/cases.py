"""What is measured: head methods with their published options, and how the model decodes under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vislm.errors import UnknownName
from vislm.heads.act import ACT
from vislm.heads.ad_hh import ADHH
from vislm.heads.air import AIR
from vislm.heads.dola import DoLa
from vislm.heads.ilvad import ILVAD
from vislm.heads.imbalanced import Imbalanced
from vislm.heads.opera import OPERA
from vislm.heads.pai import PAI
from vislm.heads.spin import SPIN
from vislm.heads.vaf import VAF
from vislm.heads.var import VAR
from vislm.heads.vcd import VCD
from vislm.heads.vhr import VHR
from vislm.heads.zerotuning import ZeroTuning
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import Heads
from vislm.lmm.interventions import Intervention

BEAMS = 5
PUBLISHED_SHARE = 20 / 1024
"""AD-HH's heads of LLaVA-1.5-7B, which AIR uses too."""


def spread_heads(adapter: Adapter, count: int, layers: range | None = None) -> Heads:
    """Return ``count`` (layer, head) pairs spread evenly over the given layers (None: all), in ascending order."""
    heads = adapter.text_config.num_attention_heads
    chosen = range(len(adapter.layers)) if layers is None else layers
    count = min(count, len(chosen) * heads)
    places = [place * len(chosen) * heads // count for place in range(count)]
    return tuple((chosen[place // heads], (place * 5 + place // heads) % heads) for place in places)


def hallucination_heads(adapter: Adapter) -> Heads:
    """Return as large a share of the heads as AD-HH lists."""
    total = len(adapter.layers) * adapter.text_config.num_attention_heads
    return spread_heads(adapter, max(1, round(PUBLISHED_SHARE * total)))


def sink_heads(adapter: Adapter) -> Heads:
    """Return one head in each layer that ACT may edit."""
    layers = range(2, max(3, len(adapter.layers) - 1))
    return spread_heads(adapter, len(layers), layers)


def half_of_the_heads(adapter: Adapter) -> Heads:
    """Return every second head: ZeroTuning tunes the larger one of two kinds."""
    heads = adapter.text_config.num_attention_heads
    return tuple((layer, head) for layer in range(len(adapter.layers)) for head in range(layer % 2, heads, 2))


@dataclass(frozen=True)
class Case:
    """A method in one setting."""

    build: Callable[[Adapter], Intervention]
    generate: dict[str, Any] = field(default_factory=dict)
    """Options of ``generate``, also of the untouched model's that it is compared with."""


CASES: dict[str, Case] = {
    "vhr": Case(lambda adapter: VHR()),
    "var": Case(lambda adapter: VAR(dims=(3, 7), tau=2.5)),
    "pai": Case(lambda adapter: PAI(gamma=1.0)),
    "pai+guidance": Case(lambda adapter: PAI()),
    "spin": Case(lambda adapter: SPIN()),
    "vaf": Case(lambda adapter: VAF()),
    "ad_hh": Case(lambda adapter: ADHH(heads=hallucination_heads(adapter))),
    "air": Case(lambda adapter: AIR(heads=hallucination_heads(adapter))),
    "air+project_prefill": Case(lambda adapter: AIR(heads=hallucination_heads(adapter), project_prefill=True)),
    "imbalanced": Case(lambda adapter: Imbalanced()),
    "act": Case(lambda adapter: ACT(heads=sink_heads(adapter), threshold=0.002)),
    "zerotuning": Case(lambda adapter: ZeroTuning(heads=half_of_the_heads(adapter), gamma=1.5)),
    "ilvad": Case(lambda adapter: ILVAD()),
    "vcd": Case(lambda adapter: VCD()),
    "dola": Case(lambda adapter: DoLa()),
    "opera": Case(lambda adapter: OPERA(threshold=None), {"num_beams": BEAMS}),
}
"""Options are the published ones but for what depends on the model: head lists are as long as published, by their share
of the heads; VAR's dimensions and threshold make one or two percent of a random model's tokens sinks, and ACT's
threshold makes its first tokens sinks, so that both have something to do. OPERA does not go back, which is no cost per
step."""


def case(name: str) -> Case:
    """Return a case.

    Raises:
        UnknownName: none of that name.
    """
    if name not in CASES:
        raise UnknownName("case of the head benchmark", name, CASES)
    return CASES[name]
