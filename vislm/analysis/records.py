"""What a recorder keeps of a run: reductions of every layer, rows of every step, maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vislm.analysis.entropy import HeadEntropy
from vislm.lmm.adapters.base import Grid
from vislm.lmm.decoder.attention import AttentionCall


@dataclass
class PrefillRecord:
    """Reductions of one decoder layer's attention at the prefill. B samples, H heads, n columns alive in the layer."""

    valid: Tensor
    """(B, n) bool."""
    image_of: Tensor
    """(B, n) int64: number of the image that a column belongs to, -1 elsewhere."""
    token_of: Tensor
    """(B, n) int64: place in the image's full token sequence, -1 elsewhere."""
    received: Tensor
    """(B, H, n): attention received per key, summed over valid rows."""
    row_entropy: Tensor
    """(B, H, n): nats."""
    flow: Tensor
    """(B, H, query groups, key groups): mean mass that a group's queries give to a group's keys."""
    value_ratio: Tensor
    """(B, H): ||v_0|| over the mean ||v_k||."""
    entropy: HeadEntropy | None = None
    sinks: Tensor | None = None
    """(B, n) bool: tokens with a massive normalised activation."""
    map: Tensor | None = None
    """(B, H, n, n)."""
    call: AttentionCall | None = None


@dataclass
class StepRecord:
    """The last row of one decoder layer at one step; step 0 is the prefill's."""

    mass: Tensor
    """(B, H, key groups): shares, summing to one."""
    visual_entropy: Tensor
    """(B, H): over ln |V|."""
    carve_entropy: Tensor
    """(B,): nats."""
    top_key: Tensor
    """(B, H) int64: the strongest key's column."""
    top_token: Tensor
    """(B, H) int64: its place among the image's tokens, -1 elsewhere."""
    sink_share: Tensor | None = None
    """(B, H): the image's sinks' share of the attention on the image."""
    row: Tensor | None = None
    """(B, H, K)."""
    image_row: Tensor | None = None
    """(B, H, m): the row on the first image's full token sequence, 0 where a token is gone."""
    head_norm: Tensor | None = None
    """(B, H): norm of the head's output before the output projection."""


@dataclass
class Recording:
    """All of one run, by layer."""

    key_groups: tuple[str, ...]
    query_groups: tuple[str, ...]
    prefill: dict[int, PrefillRecord] = field(default_factory=dict)
    steps: list[dict[int, StepRecord]] = field(default_factory=list)
    divergence: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (B, H): VHD of the prefill's last row."""
    text_activity: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (B, H): squared norm of the head's output without the image."""

    def stacked(self, name: str, sample: int = 0) -> Tensor:
        """Return (L, ...) of a field of the prefill's records for one sample; layers of equal size only."""
        return torch.stack([getattr(record, name)[sample].float() for _, record in sorted(self.prefill.items())])

    def step(self, name: str, step: int = 0, sample: int = 0) -> Tensor:
        """Return (L, ...) of a field of one step's records for one sample."""
        return _stacked([getattr(record, name)[sample].float() for _, record in sorted(self.steps[step].items())])

    def over_steps(self, name: str, sample: int = 0) -> Tensor:
        """Return (S, L, ...) of a field for all steps."""
        return _stacked([self.step(name, step, sample) for step in range(len(self.steps))])


@dataclass
class Sample:
    """One image with the model's answer and what was recorded."""

    image: Any
    answer: str
    tokens: list[str]
    """Of the answer, one for each step."""
    recording: Recording
    grids: list[Grid] = field(default_factory=list)
    """Rectangles that the image's tokens form."""
    visual: int = 0
    """Visual tokens of the image in the full prompt."""

    def image_rows(self) -> Tensor:
        """Return (S, L, H, m): the rows of all steps on the m tokens of the image, 0 where a token was dropped."""
        rows = self.recording.over_steps("image_row")
        return torch.nn.functional.pad(rows, (0, self.visual - rows.shape[-1]))


def on_image(values: Tensor, image_of: Tensor, token_of: Tensor, tokens: int) -> Tensor:
    """Return (B, H, m): values (B, H, n) of the tokens of the batch's first image by their place in it, else 0."""
    mine = (image_of == 0) & (token_of < tokens)
    place = torch.where(mine, token_of, tokens)[:, None].expand(values.shape)
    return values.new_zeros(*values.shape[:2], tokens + 1).scatter(2, place, values)[..., :tokens]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Return tensors (..., n_i) stacked, shorter ones padded with zeros: layers behind a pruner know fewer tokens."""
    if not parts[0].dim():
        return torch.stack(parts)
    longest = max(part.shape[-1] for part in parts)
    return torch.stack([torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts])
