"""FlowCut: progressive pruning by information flow, in the vision tower and once in the language model.

Source: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
NeurIPS 2025, arXiv 2505.19536; github.com/TungChintao/FlowCut.

Notation: N patches alive, T target, a = attention that patches receive from CLS, s = similarity of their values to that
of CLS, v = their values averaged over heads, L1 norm ||v||. Everything is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, gather_rows, token_count
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, LanguageStage, LanguageView, Positions, TowerStage, TowerView

TYPICAL_RATIO = 0.85
"""Entropy ratio of the CLS attention that the expected cost assumes in all layers."""
ASSUMPTION = f"an entropy ratio of {TYPICAL_RATIO} in every tower layer, which the image decides"


class Flow(NamedTuple):
    """The three signals of one layer, for N patches."""

    attention: Tensor
    """a (B, N): head mean of the CLS row (not renormalised over the patches)."""
    similarity: Tensor | None
    """s (B, N): head mean of softmax_j(v_cls . v_j); None in towers without CLS."""
    values: Tensor
    """(B, N, d): values averaged over heads."""


def importance(flow: Flow) -> Tensor:
    """Return z = (a / sum a + s / sum s) ||v||_1, shape (B, N)."""
    score = flow.attention / flow.attention.sum(-1, keepdim=True)
    if flow.similarity is not None:
        score = score + flow.similarity / flow.similarity.sum(-1, keepdim=True)
    return score * flow.values.abs().sum(-1)


def entropy_ratio(attention: Tensor, valid: Tensor | None = None, epsilon: float | None = None) -> Tensor:
    """Return the entropy of a / sum a over ln N, in [0, 1], shape (B,). N counts valid patches only.

    With ``epsilon``, -sum a ln(a + epsilon) / ln N without renormalising, as the official Qwen code has it.
    """
    count = torch.full_like(attention[:, 0], attention.shape[-1]) if valid is None else valid.sum(-1).to(attention)
    if epsilon is not None:
        return -(attention * (attention + epsilon).log()).sum(-1) / count.log()
    p = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1) / count.log()


def prune_count(ratio: Tensor, alive: Tensor, target: int, remaining: int) -> Tensor:
    """Return P = (N - T) / sqrt(remaining) (1 - H^2), unrounded, shape (B,).

    Args:
        ratio: H (B,), the entropy ratio.
        alive: N (B,).
        target: T.
        remaining: layers still to come before the last pruning point, > 0.
    """
    return (alive - target) / math.sqrt(remaining) * (1.0 - ratio**2)


def expected_patches(alive: int, target: int, remaining: int, ratio: float = TYPICAL_RATIO) -> int:
    """Return how many of ``alive`` = N patches a pruning point leaves where the entropy ratio is ``ratio``.

    Args:
        alive: N.
        target: T, what the last point (``remaining`` = 0) leaves.
        remaining: layers still to come before it.
        ratio: H; attention of images decides it, layer by layer.
    """
    if remaining == 0:
        return target
    dropped = prune_count(torch.tensor([ratio]), torch.tensor([alive]), target, remaining)
    return max(alive - int(dropped.round()), target)


def cls_flow(call: AttentionCall) -> Flow:
    """Return the signals of a tower with CLS at index 0: attention scaled as usual, similarity unscaled."""
    query, key, value = call.query[:, :, :1].float(), call.key.float(), call.value.float()
    allowed = _allowed(call)
    attention = _one_row(query, key, call.scale, allowed)[..., 1:].mean(1)
    similarity = _one_row(value[:, :, :1], value, 1.0, allowed)[..., 1:].mean(1)
    return Flow(attention, similarity, value[:, :, 1:].mean(1))


def mean_query_flow(call: AttentionCall) -> Flow:
    """Return the signals of a tower without CLS: the mean query takes its place, and there is no similarity term."""
    query, allowed = call.query.float(), _allowed(call)
    if allowed is None:
        query = query.mean(2, keepdim=True)
    else:  # padding has no part in the mean
        share = (allowed / allowed.sum(-1, keepdim=True)).unsqueeze(-1)
        query = (query * share).sum(2, keepdim=True)
    return Flow(_one_row(query, call.key.float(), call.scale, allowed).mean(1), None, call.value.float().mean(1))


def last_token_flow(call: AttentionCall, image_of: Tensor) -> Tensor:
    """Return scores (B, S) of visual columns from the last prompt token; 0 elsewhere.

    Both softmaxes run over the columns of one image only, and both are scaled by 1 / sqrt(d).
    """
    heads, groups = call.query.shape[1], call.key.shape[1]
    value = call.value.float().repeat_interleave(heads // groups, dim=1)
    query, key, scale = call.query[:, :, -1:].float(), call.key.float(), call.scale
    scores = torch.zeros(image_of.shape, device=image_of.device)
    for image in image_of[image_of >= 0].unique().tolist():
        row = int((image_of == image).any(-1).nonzero()[0])
        span = image_of[row] == image
        last = slice(row, row + 1)
        v = value[last][:, :, span]
        attention = _one_row(query[last], key[last][:, :, span], scale).mean(1)
        similarity = _one_row(value[last, :, -1:], v, scale).mean(1)
        scores[row, span] = importance(Flow(attention, similarity, v.mean(1)))[0]
    return scores


def _one_row(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    """Return softmax(query . key scale) (B, H, Nk) of a query (B, H, 1, d), keys (B, G, Nk, d), allowed (B, 1, Nk)."""
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key.transpose(2, 3)).flatten(1, 2) * scale
    return (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)


def _allowed(call: AttentionCall) -> Tensor | None:
    """Return the tokens (B, 1, Nk) bool of a tower's call that are no padding; None if none is."""
    if call.mask is None:
        return None
    return call.allowed(torch.tensor([0], device=call.query.device))[:, :, 0]


@dataclass(frozen=True)
class FlowCut:
    """Prune in the tower after every ``period``-th layer, at a pace set by the entropy of the CLS attention.

    Scores are smoothed over layers: c = history c + (1 - history) z. Between two prunings nothing is dropped; at the
    last point before the layer that the language model reads, exactly the target stays.
    """

    keep: int | float = 64
    """Visual tokens per image that reach the end, or a ratio of them."""
    where: Literal["auto", "tower", "language", "both"] = "auto"
    """"auto": the tower for one crop per image, both for tiled images and images of any size; the language model where
    the tower cannot be pruned."""
    tower_keep: int | None = None
    """Patches per crop (of a video: per frame) that leave the tower; default: ``keep``, or half of it when the language
    model prunes too, which are 2.5 times ``keep`` in five crops. Where four patches are one token (Qwen2-VL): 4
    ``keep``, or 8 ``keep`` when it prunes too. A ratio is doubled when it prunes too."""
    unit: Literal["cell", "patch"] = "cell"
    """What is dropped where several patches are one token: cells, or single patches, as the official code does. Then
    four survivors in a row make a token, which takes the place of an early cell."""
    positions: Positions = "contiguous"
    """Both official codes for LLaMA number the survivors anew."""
    layer: int = 1
    """The language stage ranks by decoder layer ``layer`` and drops behind it."""
    history: float = field(default=0.5, metadata={"range": (0.0, 0.9)})
    period: int = field(default=2, metadata={"range": (1, 6)})
    shared_count: bool = False
    """Let all images of a call drop as many patches as the one that drops most, as the official code does for the
    crops of an image. Off: each crop has its own pace, and a batch gives what its images give alone."""
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "flowcut"

    def plan(self, adapter: Adapter) -> Sequence[TowerStage | LanguageStage]:
        """Return one stage per tower layer up to the read layer, and / or one inside the language model."""
        check_keep(self.keep)
        if self.period < 1 or not 0.0 <= self.history < 1.0:
            raise UsageError(f"period={self.period}, history={self.history}: expected period >= 1 and 0 <= history < 1")
        where = self._where(adapter)
        stages: list[TowerStage | LanguageStage] = []
        if where in ("tower", "both"):
            stages += self._tower(adapter, where)
        if where in ("language", "both"):
            if self.layer + 1 >= len(adapter.layers):
                raise PlanConflict(
                    f"flowcut: layer={self.layer} is not before the last of {len(adapter.layers)} layers"
                )
            stages.append(
                LanguageStage(
                    self.layer + 1,
                    self.layer,
                    lambda call: call,
                    self._language,
                    self.positions,
                    expected=lambda alive: token_count(self.keep, alive.tokens),
                )
            )
        return stages

    def _where(self, adapter: Adapter) -> str:
        if self.where != "auto":
            return self.where
        if adapter.tower_conflict:
            return "language"
        return "tower" if adapter.crops_per_image == 1 else "both"

    def _target(self, cell: int, where: str, patches: int) -> int:
        """Return how many of a crop's patches leave the tower."""
        if self.tower_keep is not None:
            return min(self.tower_keep, patches)
        both = where == "both"
        if isinstance(self.keep, float):
            keep = token_count(min(1.0, 2 * self.keep) if both else self.keep, patches // cell)
        elif both:
            keep = max(1, self.keep // 2) if cell == 1 else 2 * self.keep
        else:
            keep = self.keep
        return min(patches, cell * keep)

    def _tower(self, adapter: Adapter, where: str) -> list[TowerStage]:
        cell, grid = adapter.cell, adapter.patch_grid
        patches = None if grid is None else grid[0] * grid[1]
        target = partial(self._target, cell, where)
        if self.tower_keep is not None:
            check_keep(self.tower_keep)
            if self.tower_keep % cell:
                raise UsageError(
                    f"tower_keep={self.tower_keep}: {cell} patches are one token; give a multiple of {cell}"
                )
        if patches is not None and target(patches) >= patches:
            return []
        signal = cls_flow if adapter.tower_prefix else mean_query_flow
        last = len(adapter.tower_layers) if adapter.packed_tower else adapter.read_layer
        return self.tower_stages(last, target, signal, cell if self.unit == "cell" else 1)

    def tower_stages(
        self, last: int, target: int | Callable[[int], int], signal: Callable[[AttentionCall], Flow], cell: int = 1
    ) -> list[TowerStage]:
        """Return the stages after tower layers 0 .. ``last`` - 1; ``target`` patches are left behind the last one.

        ``target`` may be a function of the crop's number of patches.

        With ``cell`` > 1 whole cells of so many consecutive patches are dropped, scored by their mean: what a merger
        joins later stays one piece of the picture. The official Qwen2-VL code drops single patches.
        """

        def stage(layer: int) -> TowerStage:
            def select(view: TowerView) -> Tensor | None:
                count = target if isinstance(target, int) else target(view.num_patches)
                return self._select(view, count, last - layer - 1, cell)

            def expected(alive: Alive) -> int:
                count = target if isinstance(target, int) else target(alive.total)
                return self._expected(alive.tokens, count, last - layer - 1, cell)

            remaining = last - layer - 1
            guess = ASSUMPTION if remaining and not remaining % self.period else None
            return TowerStage(layer, signal, select, _gather_history, self.positions, expected, guess)

        return [stage(layer) for layer in range(last)]

    def _select(self, view: TowerView, target: int, remaining: int, cell: int) -> Tensor | None:
        flow: Flow = view.signal
        score = importance(flow)
        if "score" in view.memory:
            score = self.history * view.memory["score"] + (1.0 - self.history) * score
        view.memory["score"] = score
        if (score.shape[1] <= target and view.valid is None) or remaining % self.period:
            return None
        alive = torch.full_like(score[:, 0], score.shape[1]) if view.valid is None else view.valid.sum(-1).to(score)
        if remaining == 0:
            count = torch.full_like(alive, target)
        else:
            dropped = prune_count(entropy_ratio(flow.attention, view.valid), alive, target, remaining)
            dropped = dropped.max().expand_as(dropped) if self.shared_count else dropped
            count = (alive - dropped.round()).clamp(min=target)
        if cell == 1:
            return _top(score, count, view.valid)
        cells = score.unflatten(1, (-1, cell)).mean(-1)
        return _top(cells, (count / cell).ceil(), None).repeat_interleave(cell, dim=1)

    def _expected(self, alive: int, target: int, remaining: int, cell: int) -> int:
        if alive <= target or remaining % self.period:
            return alive
        return math.ceil(expected_patches(alive, target, remaining) / cell) * cell

    def _language(self, view: LanguageView) -> Tensor:
        return view.top_per_image(last_token_flow(view.signal, view.image_of), self.keep)


def _top(score: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
    """Return keep (B, N): the ``count`` (B,) highest scores of each row, ties to the lower index."""
    if valid is not None:
        score = score.masked_fill(~valid, -torch.inf)
    rank = torch.argsort(torch.argsort(score, dim=-1, descending=True, stable=True), dim=-1)
    return rank < count.unsqueeze(-1)


def _gather_history(memory: dict, index: Tensor) -> None:
    memory["score"] = gather_rows(memory["score"], index)


METHOD = FlowCut
