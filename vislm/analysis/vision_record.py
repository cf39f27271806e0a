"""Recording a backbone's attention at the levels of a :class:`~vislm.analysis.recorder.Recorder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislm.analysis.distance import HeadProfile, head_profile
from vislm.analysis.entropy import HeadEntropy, head_entropy
from vislm.analysis.massive import Activations, watch_blocks
from vislm.analysis.recorder import Recorder, check_maps, map_bytes
from vislm.analysis.rows import row_pieces
from vislm.analysis.vision import Site, VisionRows, watching


@dataclass
class VisionLayer:
    """One attention of a backbone on B images; (h, w) is its grid of N patches, P its prefix tokens."""

    grid: tuple[int, int]
    prefix: int
    profile: HeadProfile
    prefix_rows: Tensor | None = None
    """(B, H, P, P + N): rows of class and register tokens."""
    map: Tensor | None = None
    """(B, H, P + N, P + N)."""
    rows: VisionRows | None = None
    entropy: HeadEntropy | None = None
    """Of rows and columns; with the recorder's ``columns``."""


@dataclass
class VisionRecording:
    """All attentions of one forward pass, in order, and the largest activations behind their blocks."""

    layers: list[VisionLayer] = field(default_factory=list)
    activations: list[Activations] = field(default_factory=list)


def record_vision(model: nn.Module, sites: Sequence[Site], images: Tensor, recorder: Recorder) -> VisionRecording:
    """Run a model on images (B, 3, H, W) and return what the recorder asks for.

    Args:
        model: as :func:`~vislm.analysis.vision.readable` has prepared it.
        sites: its attentions.
        images: normalised.
        recorder: "last_rows" are rows of class and register tokens here; ``layers`` count attentions.

    Raises:
        UsageError: full maps that exceed the recorder's limit.
    """
    recording = VisionRecording()
    chosen = range(len(sites)) if recorder.layers is None else recorder.layers
    records: dict[int, VisionLayer] = {}

    def see(number: int, rows: VisionRows) -> None:
        if number not in chosen:
            return
        full = None
        if recorder.level == "maps":
            wanted = map_bytes(rows.shape, 1) + sum(
                map_bytes(r.map.shape, 1) for r in records.values() if r.map is not None
            )
            check_maps(wanted, recorder.limit, f"the first {len(records) + 1} layers")
            full = torch.cat([piece.cpu() for _, piece in row_pieces(rows)], 2)
        few = None
        if recorder.level != "reductions" and rows.prefix:
            few = rows.rows(torch.arange(rows.prefix)).cpu()
        profile = head_profile(rows, rows.grid, rows.prefix)
        kept = rows if recorder.keep_calls else None
        entropy = head_entropy(rows, causal=False) if recorder.columns else None
        records[number] = VisionLayer(rows.grid, rows.prefix, profile, few, full, kept, entropy)

    run: Any = getattr(model, "encode_image", model)
    with torch.no_grad(), watching(sites, see), watch_blocks([site.block for site in sites]) as activations:
        run(images)
    recording.layers = [records[number] for number in sorted(records)]
    recording.activations = activations
    return recording
