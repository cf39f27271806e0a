"""Attention knockout: cut the attention between groups of tokens in some layers, and see what the answer loses.

Source: Kim et al., "Map the Flow", ICLR 2026, arXiv 2510.13251; github.com/byminji/map-the-flow. Flow is written from
keys to queries: "image>question" cuts what the question's tokens read from the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.interventions import EditStage, EditView

Span = tuple[int, int]
Pairs = Iterable[tuple[Iterable[int], Iterable[int]]]
"""(queries, keys), each pair of which is blocked (or kept)."""

GROUPS = ("bos", "before", "image", "between", "question", "last", "text", "all")
"""Tokens of a prompt: the first; text before images; images; text between them (and markers of tiles); text behind them
but the last token; the last; all text; all."""
EARLIER, OWN = "earlier_frames", "own_frame"
"""Sources for the image alone: the frames (or images) before the query's own, and that one."""


# -- masks -------------------------------------------------------------------------------------------------------------
def knockout_mask(tokens: int, pairs: Pairs, *, opposite: bool = False) -> Tensor:
    """Return (T, T) bool, True = may attend: the causal mask without the listed pairs.

    Args:
        tokens: T.
        pairs: query and key indices.
        opposite: as published: start from the complement of the causal mask and open the listed pairs. It opens future
            positions and closes the diagonal; :class:`Knockout` stays causal and keeps the diagonal.
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = ~mask if opposite else mask
    for queries, keys in pairs:
        mask[torch.tensor(list(queries))[:, None], torch.tensor(list(keys))] = opposite
    return mask


def frame_spans(start: int, frames: int, tokens_per_frame: int) -> list[Span]:
    """Return the columns [a, b) of every frame of a video whose tokens begin at ``start``."""
    return [(start + n * tokens_per_frame, start + (n + 1) * tokens_per_frame) for n in range(frames)]


def cross_frame_pairs(frames: Sequence[Span]) -> list[tuple[range, range]]:
    """Return the pairs from each frame's queries to the keys of all earlier frames."""
    return [(range(*own), range(*earlier)) for n, own in enumerate(frames) for earlier in frames[:n]]


def window(centre: int, width: int, depth: int) -> range:
    """Return the layers of a window of ``width`` around ``centre``, cut at the ends of ``depth`` layers."""
    _check_layer(centre, depth)
    return range(max(0, centre - width // 2), min(depth, centre + math.ceil(width / 2)))


def layers_at(
    centre: int, width: int, depth: int, mode: Literal["window", "inverse", "top_down", "bottom_up"] = "window"
) -> list[int]:
    """Return the layers to cut for one point of a curve: a window, all others, from ``centre`` on, or up to it."""
    inside = window(centre, width, depth)
    if mode == "window":
        return list(inside)
    if mode == "inverse":
        return [layer for layer in range(depth) if layer not in inside]
    if mode == "top_down":
        return list(range(centre, depth))
    if mode == "bottom_up":
        return list(range(centre + 1))
    raise UnknownName("mode of layers", mode, ("window", "inverse", "top_down", "bottom_up"))


def relative_change(new: Tensor, base: Tensor) -> Tensor:
    """Return (p_new - p_base) / p_base in percent."""
    return 100.0 * (new - base) / base.clamp(min=torch.finfo(base.dtype).tiny)


# -- in a running model ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Knockout:
    """Cut edges "source>target" in some layers: the target's queries do not see the source's keys.

    A row always keeps its own position, so that none is empty. Tokens of the answer count as the last prompt token;
    they see each other.
    """

    cut: tuple[str, ...] = ()
    """Edges, e.g. ("image>question", "image>last", "earlier_frames>image")."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: all."""
    keep_only: bool = False
    """Cut all edges of the prompt but those listed ("opposite" in the code), within the causal mask."""
    spans: tuple[tuple[str, int, int], ...] = ()
    """Further groups (name, start, stop) of prompt columns counted from the end, e.g. ("options", -9, -3)."""
    tokens_per_frame: int | None = None
    """Cut frames of this many visual tokens from each video; None: every image is a frame."""
    name = "knockout"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none without edges."""
        edges = [parse_edge(edge, {name for name, _, _ in self.spans}) for edge in self.cut]
        for name, start, stop in self.spans:
            if not start < stop <= 0:
                raise UsageError(f"span {name}: [{start}, {stop}) is no part of a prompt, counted from its end")
        depth = len(adapter.layers)
        layers = range(depth) if self.layers is None else self.layers
        for layer in layers:
            _check_layer(layer, depth)
        if not edges or not layers:
            return []
        last = not self.keep_only and all(target == "last" for _, target in edges)
        return [EditStage(frozenset(layers), self._edit, "last" if last else "all", every_sample=True)]

    def _edit(self, view: EditView) -> Tensor | None:
        edges = [parse_edge(edge, {name for name, _, _ in self.spans}) for edge in self.cut]
        blocked = self.blocked(view.keys, view.rows, edges, view.phase)
        blocked = blocked & view.allowed[:, 0]
        if not bool(blocked.any()):
            return None
        view.row_mask = view.row_mask & blocked.any(-1)
        return view.softmax(view.logits.masked_fill(blocked[:, None], -torch.inf))

    def blocked(self, keys: KeyGroups, rows: Tensor, edges: Sequence[tuple[str, str]], phase: str) -> Tensor:
        """Return (B, R, K) bool: the pairs of rows (R,) and keys that are cut."""
        groups, frames = token_groups(keys, self.spans), self._frames(keys)
        width, device = keys.valid.shape[1], keys.valid.device
        columns = torch.arange(width, device=device)
        prompt = keys.valid & (columns < keys.prompt)
        listed = torch.zeros(len(prompt), len(rows), width, dtype=torch.bool, device=device)
        for source, target in edges:
            if phase == "decode":  # an answer's token takes the place of the last one of the prompt
                asked = torch.full(listed.shape[:2], target in ("last", "text", "all"), device=device)
            else:
                asked = groups[target][:, rows]
            if source in (EARLIER, OWN):
                own = frames[:, rows] if phase == "prefill" else torch.full(listed.shape[:2], -1, device=device)
                theirs = frames[:, None]
                seen = (theirs < own[..., None]) if source == EARLIER else (theirs == own[..., None])
                seen = seen & (theirs >= 0)
            else:
                seen = (groups[source] & prompt)[:, None]
            listed = listed | (asked[..., None] & seen)
        if self.keep_only:
            listed = ~listed & prompt[:, None]
        if phase == "prefill":
            listed = listed & (columns != rows[:, None])
        return listed

    def _frames(self, keys: KeyGroups) -> Tensor:
        """Return (B, K) the number of a key's frame, -1 elsewhere."""
        if self.tokens_per_frame is None:
            return keys.image_of
        stride = keys.token_of.amax().clamp(min=0) // self.tokens_per_frame + 1
        inside = keys.image_of * stride + keys.token_of // self.tokens_per_frame
        return torch.where(keys.image_of >= 0, inside, -1)


def token_groups(keys: KeyGroups, spans: Sequence[tuple[str, int, int]] = ()) -> dict[str, Tensor]:
    """Return name -> (B, K) bool: the groups of :data:`GROUPS` and further ``spans``; generated keys are in none."""
    columns = torch.arange(keys.valid.shape[1], device=keys.valid.device)
    prompt = keys.valid & (columns < keys.prompt)
    last = prompt & (columns == keys.prompt - 1)
    bos = prompt & (columns == keys.first[:, None]) & ~last
    after = keys.after & prompt & ~last
    before = keys.before & prompt & ~last & ~bos
    groups = {
        "bos": bos,
        "before": before,
        "image": keys.image,
        "between": prompt & ~keys.image & ~before & ~after & ~bos & ~last,
        "question": torch.where(keys.image.any(-1, keepdim=True), after, before),
        "last": last,
        "text": prompt & ~keys.image,
        "all": prompt,
    }
    for name, start, stop in spans:
        inside = (columns >= keys.prompt + start) & (columns < keys.prompt + stop)
        groups[name] = prompt & inside
    return groups


def parse_edge(edge: str, further: Iterable[str] = ()) -> tuple[str, str]:
    """Return (source, target) of "source>target".

    Raises:
        UsageError: no such form, or earlier frames with another target than the image.
        UnknownName: a group that there is not.
    """
    source, arrow, target = edge.partition(">")
    if not arrow:
        raise UsageError(f"edge {edge!r}: expected source>target, such as image>last")
    known = (*GROUPS, *further)
    if source in (EARLIER, OWN) and target != "image":
        raise UsageError(f"edge {edge!r}: {source} is a source for the image alone")
    for group in (target,) if source in (EARLIER, OWN) else (source, target):
        if group not in known:
            raise UnknownName("group of tokens", group, (*known, EARLIER, OWN))
    return source, target


def _check_layer(layer: int, depth: int) -> None:
    if not 0 <= layer < depth:
        raise UsageError(f"layer {layer}: the model has layers 0..{depth - 1}")
