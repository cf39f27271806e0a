"""VisionZip: keep the patches that attract attention, and join all others into a few contextual tokens.

Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv 2412.04467; github.com/dvlab-research/VisionZip.

Notation: a crop has N tokens and a budget of T = D + Ctx. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.crops import (
    Group,
    check_budget,
    crop_budgets,
    crop_tokens,
    packed,
    packed_features,
    patch_attention,
    seated,
)
from vislm.lmm.choosing.ranking import top
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, ImageView, Positions, PromptStage, Selection, TowerSignal

Kind = Literal["dominant", "cls", "contextual"]
KINDS: tuple[Kind, ...] = ("dominant", "cls", "contextual")


class Block(NamedTuple):
    """Crops that are put in order together."""

    number: int
    shared: bool
    """Whether it has several crops."""


class Zipped(NamedTuple):
    """How the N tokens of a crop are shared out; indices into them."""

    dominant: Tensor
    """(d,) most attended first."""
    targets: Tensor
    """(Ctx,) ascending: the token that each contextual token is built on."""
    others: Tensor
    """Ascending: what is neither dominant nor a target."""
    owner: Tensor
    """As ``others``: the contextual token (0..Ctx-1) that it joins."""


def mean_keys(call: AttentionCall, prefix: int) -> Tensor:
    """Return the metric (K, N, d): keys of the patches averaged over heads, unscaled, float32."""
    return call.key.float().mean(1)[:, prefix:]


def zip_tokens(attention: Tensor, metric: Tensor, dominant: int, contextual: int) -> Zipped:
    """Choose dominant tokens by attention (N,), and match the rest R to evenly spaced targets by their metric (N, d).

    Targets are the first ``contextual`` at steps of max(1, R // contextual) in sequence order; every other token joins
    the target of the largest cosine similarity.
    """
    best = top(attention, dominant)
    is_rest = torch.ones(len(attention), dtype=torch.bool, device=attention.device)
    is_rest[best] = False
    rest = is_rest.nonzero().squeeze(1)
    if contextual == 0:
        return Zipped(best, rest[:0], rest[:0], rest[:0])
    chosen = torch.zeros_like(is_rest)
    chosen[rest[:: max(1, len(rest) // contextual)][:contextual]] = True
    targets, others = chosen.nonzero().squeeze(1), (is_rest & ~chosen).nonzero().squeeze(1)
    unit = normalize(metric.float(), dim=-1)
    similarity = unit[others] @ unit[targets].T
    return Zipped(best, targets, others, similarity.argmax(-1))


def contextual_tokens(features: Tensor, zipped: Zipped) -> Tensor:
    """Return ctx_c = F[target c] + mean of the features (N, Cv) of the tokens that join c, shape (Ctx, Cv).

    A sum of two terms, not a mean, as in the official code; a target that nothing joins stays as it is.
    """
    own = features[zipped.targets]
    joins = (zipped.owner == torch.arange(len(own), device=own.device).unsqueeze(1)).to(features)
    return own + joins @ features[zipped.others] / joins.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class VisionZip:
    """Replace an image's tokens by D dominant ones, CLS among them, and Ctx contextual ones.

    Official order: dominant tokens in raster order with CLS first, contextual ones at the end; in tiled images the base
    view like that, then dominant tokens of all tiles in raster order, their CLS, their contextual tokens. Padding is
    removed before the budget is spent (the official code keeps it); newline tokens go. Towers without CLS rank by the
    attention received from all tokens, and D counts patches only; where patches are joined before the projector, no CLS
    can be read either, and joined cells are ranked and zipped by the mean of their patches.

    With original positions the order is that of the seats: a contextual token sits where its target was, and CLS comes
    first of its crop, which takes the first free seat; tokens before that seat move on by one.
    """

    keep: int | float = 64
    """Visual tokens per image (CLS and contextual ones included), or a ratio of them; crops get equal shares."""
    contextual: int | None = None
    """Contextual tokens of each crop; None: 10 of 64 of its budget, which gives the published 10, 20, 30."""
    crop_keep: int | None = None
    """Tokens of each crop whatever their number, in place of ``keep``: the official rule for tiled images."""
    positions: Positions = "contiguous"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "visionzip"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model, which looks at attention and keys of the read layer."""
        check_budget(self.keep, self.crop_keep)
        budget = self.keep if self.crop_keep is None and adapter.crops_per_image == 1 else self.crop_keep
        if self.contextual is not None:
            if self.contextual < 0:
                raise UsageError(f"contextual={self.contextual}: expected 0 or more")
            if isinstance(budget, int) and self.contextual >= budget:
                raise UsageError(f"contextual={self.contextual} must be fewer than the {budget} tokens of a crop")
        prefix, layer = adapter.tower_prefix, adapter.read_layer
        signals = {
            "attention": TowerSignal(layer, partial(patch_attention, prefix=prefix)),
            "metric": TowerSignal(layer, partial(mean_keys, prefix=prefix)),
        }
        return [PromptStage(partial(self._select, prefix), self.positions, signals, expected=self._expected)]

    def _expected(self, alive: Alive) -> int:
        return alive.after(sum(crop_budgets(alive.crops, self.keep, self.crop_keep)))

    def _contextual(self, budget: int) -> int:
        wanted = round(budget * 10 / 64) if self.contextual is None else self.contextual
        return max(0, min(wanted, budget - 1))

    def _select(self, prefix: int, view: ImageView) -> Tensor | Selection:
        crops = crop_tokens(view, "attention")
        budgets = crop_budgets([len(tokens) for tokens in crops], self.keep, self.crop_keep)
        if all(budget == len(tokens) for budget, tokens in zip(budgets, crops, strict=True)):
            return torch.ones_like(view.candidates)
        assert view.tower is not None
        attention, metric = packed(view, "attention")[:, 0], packed(view, "metric")
        features, heads = packed_features(view, prefix), view.tower.features if prefix else None
        groups: list[Group] = []
        for crop, (tokens, budget, block) in enumerate(zip(crops, budgets, _blocks(crops), strict=True)):
            if budget == 0:
                continue
            key = partial(self._order, block, tokens, len(features))
            if budget == len(tokens):
                groups.append(Group(tokens, key("dominant", tokens)))
                continue
            contextual = self._contextual(budget)
            dominant = budget - contextual - (heads is not None)
            local = zip_tokens(attention[tokens], metric[tokens], dominant, contextual)
            best, targets, others = (tokens[index] for index in local[:3])
            groups.append(Group(best, key("dominant", best)))
            if heads is not None:
                seat = tokens[~torch.isin(tokens, torch.cat([best, targets]))][:1]
                groups.append(Group(seat, key("cls", seat), heads[crop, :1].float(), seat[:0], seat[:0]))
            if contextual:
                made = contextual_tokens(features[tokens], local)
                owner = torch.cat([torch.arange(len(targets), device=tokens.device), local.owner])
                groups.append(Group(targets, key("contextual", targets), made, torch.cat([targets, others]), owner))
        return seated(view, groups)

    def _order(self, block: Block, tokens: Tensor, total: int, kind: Kind, seats: Tensor) -> Tensor:
        """Return the sort keys (k,) of a crop's tokens of one kind: its seats, or the place in the official order."""
        if self.positions == "original":
            return 2 * seats if kind != "cls" else 2 * tokens[:1] - 1
        stage = KINDS.index(kind) + 1 if kind != "cls" or block.shared else 0
        order = torch.zeros_like(seats) if kind != "dominant" else seats
        return (4 * block.number + stage) * total + order


def _blocks(crops: list[Tensor]) -> list[Block]:
    """Return each crop's block: its own if the crop's tokens lie in one piece, else the one that all others share.

    The tiles of a grid are not in one piece: newlines break them, and neighbours interleave.
    """
    whole = [len(tokens) == 0 or int(tokens[-1] - tokens[0]) + 1 == len(tokens) for tokens in crops]
    first = whole.index(False) if False in whole else 0
    return [Block(crop, False) if one else Block(first, True) for crop, one in enumerate(whole)]


METHOD = VisionZip
