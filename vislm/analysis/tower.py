"""Attention distance in the vision tower of an LMM, taken while it encodes the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vislm.analysis.call_rows import CallRows
from vislm.analysis.distance import HeadProfile, head_profile, mean_profile
from vislm.analysis.patterns import cluster_heads
from vislm.analysis.results import Analysis
from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import ProbeStage, TowerSignal
from vislm.lmm.model import LMM, ImageSource


@dataclass(frozen=True, eq=False)
class TowerProfiler:
    """Take the head profile of every layer of the tower; read ``found`` afterwards."""

    found: dict[int, HeadProfile] = field(default_factory=dict)
    name = "tower_profiler"

    def plan(self, adapter: Adapter) -> Sequence[ProbeStage]:
        """Return one probe stage.

        Raises:
            UsageError: a tower whose grid of patches depends on the image, or that is cut into windows.
        """
        if adapter.packed_tower or adapter.patch_grid is None:
            raise UsageError(f"the tower of {adapter.family} has no fixed grid of patches to measure distances on")
        grid, prefix = adapter.patch_grid, adapter.tower_prefix

        def take(layer: int, call: AttentionCall) -> Tensor:
            self.found[layer] = head_profile(CallRows(call), grid, prefix)
            return call.query.new_zeros(call.query.shape[0], 1)

        signals = {
            f"layer {n}": TowerSignal(n, lambda call, layer=n: take(layer, call)) for n in range(adapter.read_layer + 1)
        }
        return [ProbeStage(lambda view: None, signals)]


def add_tower(analysis: Analysis, lmm: LMM, images: Sequence[ImageSource]) -> None:
    """Add distance, entropy and patterns of the tower's heads; a note where its grid is not fixed."""
    found: dict[int, list[tuple[int, HeadProfile]]] = {}
    for image in images:
        profiler = TowerProfiler()
        try:
            with lmm.using(profiler), torch.no_grad():
                lmm.ask(image, "?", max_new_tokens=1)
        except UsageError as error:
            analysis.header.setdefault("skipped", {})["tower"] = str(error)
            return
        for layer, profile in profiler.found.items():
            found.setdefault(layer, []).append((1, profile))
    profiles = [mean_profile(found[layer]) for layer in sorted(found)]
    for name, field_name, title in (
        ("tower.mean_distance", "mean_distance", "vision tower: mean attention distance (patches)"),
        ("tower.patch_entropy", "patch_entropy", "vision tower: entropy over patches (nats)"),
        ("tower.prefix_mass", "prefix_mass", "vision tower: attention on CLS"),
        ("tower.column_max", "column_max", "vision tower: largest share drawn by one token"),
    ):
        stacked = torch.stack([getattr(p, field_name) for p in profiles])
        analysis.measure(name, stacked, title, "(vision layer, head), mean over images")
    analysis.add("tower.hop_strength", torch.stack([p.hop_strength for p in profiles]), "(vision layer, head, hops)")
    patterns = cluster_heads(profiles)
    title = "vision tower: cluster of the pattern"
    analysis.measure("tower.cluster", patterns.cluster.float(), title, "(vision layer, head)")
    analysis.header["tower_patterns"] = {"clusters": patterns.names, "kinds": patterns.kinds}
