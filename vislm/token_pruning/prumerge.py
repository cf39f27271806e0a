"""PruMerge and PruMerge+: keep outliers of the attention, and let each of them absorb the patches with similar keys.

Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025,
arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge.

Notation: a crop has N tokens; a = attention that they receive from CLS, in the last tower layer, as if it had a single
head of its full width C; rho = share of tokens to keep. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.crops import Group, crop_budgets, crop_tokens, packed, packed_features, patch_attention, seated
from vislm.lmm.choosing.ranking import top
from vislm.lmm.choosing.tokens import check_keep
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, ImageView, Positions, PromptStage, Selection, TowerSignal

NEIGHBOURS = 32
"""Tokens that each kept one absorbs."""
TYPICAL_RATIO = 1 / 14.4
"""The mean adaptive rho for LLaVA-1.5, by the paper's first version."""


def wide_keys(call: AttentionCall, prefix: int) -> Tensor:
    """Return the keys of the patches at full width (K, N, C): heads concatenated, bias included, float32."""
    return call.key.transpose(1, 2).flatten(2).float()[:, prefix:]


def wide_attention(call: AttentionCall, prefix: int) -> Tensor:
    """Return a (K, N, 1): softmax over all tokens of q_cls . k / sqrt(C), with heads concatenated; not renormalised.

    Without CLS, the mean over the rows of all tokens.
    """
    query, key = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (call.query, call.key))
    return patch_attention(replace(call, query=query, key=key, value=key, scale=query.shape[-1] ** -0.5), prefix)


def outlier_ratio(attention: Tensor) -> float:
    """Return rho: the share of all values of a (any shape) above Q3 + 1.5 (Q3 - Q1), with interpolated quartiles."""
    values = attention.flatten().cpu().double()
    low, high = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    return int((values > high + 1.5 * (high - low)).sum()) / len(values)


def kept_tokens(attention: Tensor, ratio: float, plus: bool = False) -> Tensor:
    """Return the indices of the tokens to keep: the top int(N rho), at least one, most attended first.

    Args:
        attention: a (N,).
        ratio: rho.
        plus: PruMerge+: append every int(int(1/rho)/3)-th token, at least every one, from 0 to before the last, that is
            not kept yet. (The official code fails for rho = 0 and rho > 1/3, where one of the guards is at work.)
    """
    total = len(attention)
    best = top(attention, max(1, int(total * ratio)))
    if not plus or total < 2:
        return best
    step = max(1, int(int(1 / max(ratio, 1 / total)) / 3))
    spaced = torch.arange(0, total - 1, step, device=best.device)
    return torch.cat([best, spaced[~torch.isin(spaced, best)]])


def expected_number(total: int, ratio: float, plus: bool = False) -> int:
    """Return how many of ``total`` tokens :func:`kept_tokens` returns; with ``plus`` the mean over random attention."""
    best = max(1, int(total * ratio))
    if not plus or total < 2:
        return best
    step = max(1, int(int(1 / max(ratio, 1 / total)) / 3))
    return best + round(len(range(0, total - 1, step)) * (1 - best / total))


def kept_number(attention: Tensor, count: int, plus: bool = False) -> Tensor:
    """Return the indices of exactly ``count`` tokens to keep, most attended first.

    With ``plus`` a quarter of them, at least one, by attention (N,), which is about the share that the official rule
    leaves to it, and then the rest evenly spaced among the others.
    """
    best = top(attention, min(count, max(1, count // 4)) if plus else count)
    free = torch.ones(len(attention), dtype=torch.bool, device=best.device)
    free[best] = False
    others, wanted = free.nonzero().squeeze(1), count - len(best)
    return torch.cat([best, others[torch.arange(wanted, device=best.device) * len(others) // max(1, wanted)]])


def merge(attention: Tensor, keys: Tensor, features: Tensor, kept: Tensor) -> Tensor:
    """Return one row per token of ``kept`` (M,), in their order, and the extra token: shape (M + 1, Cv).

    out_i = F_i + sum_n a_n F_n over the min(32, N - 1) other tokens, kept or not, with the keys (N, C) most similar to
    that of i (cosine; ties go to kept ones, then to lower indices); extra = sum_j a_j F_j over the dropped ones.
    Attention is a (N,), features F (N, Cv).
    """
    unit = normalize(keys.float(), dim=-1)
    is_dropped = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().squeeze(1)
    order = torch.cat([kept, dropped])
    similarity = (unit[kept] @ unit.T)[:, order]
    similarity.fill_diagonal_(-torch.inf)
    nearest = order[similarity.argsort(descending=True, stable=True)[:, : min(NEIGHBOURS, len(keys) - 1)]]
    weights = torch.zeros_like(similarity).scatter(1, nearest, attention[nearest])
    extra = attention[dropped].unsqueeze(0) @ features[dropped]
    return torch.cat([features[kept] + weights @ features, extra])


@dataclass(frozen=True)
class PruMerge:
    """Keep outliers of the tower's attention and merge the other tokens into them; one extra token gathers the dropped.

    rho adapts to the image unless ``keep`` or ``reduction_ratio`` fixes it. The extra token comes last, in the last
    free seat of its crop (tokens behind that seat move down by one). In tiled images every crop is reduced for itself
    with the image's rho, after padding is removed; newline tokens go. In towers without CLS, a is the mean attention
    that a token receives from all tokens. Where patches are joined before the projector, cells are reduced, by the mean
    of their keys, the sum of their attention, and their projected features.
    """

    keep: int | float | None = None
    """Visual tokens per image (extra tokens included), or a ratio of them; None: adaptive."""
    plus: bool = False
    """PruMerge+: also keep regularly spaced tokens."""
    reduction_ratio: float | None = None
    """The official fixed ratio: int(N rho) tokens of each crop and one extra (with ``plus``, spaced ones besides)."""
    shared_ratio: bool = False
    """One adaptive rho for all images of a call, from the quartiles of all of them, as in the official code. Off: a
    batch gives what its images give alone."""
    attention_order: bool = False
    """Hand tokens over in falling order of attention (spaced ones behind), as the official code does, which scrambles
    the picture. Off: in raster order. Either way the extra token is last of its crop."""
    positions: Positions = "contiguous"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "prumerge"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model, which looks at queries and keys of the last tower layer."""
        if self.keep is not None:
            check_keep(self.keep)
        given = {"keep": self.keep, "reduction_ratio": self.reduction_ratio, "shared_ratio": self.shared_ratio or None}
        given = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"prumerge: {' and '.join(given)} exclude each other; give one of them")
        if self.reduction_ratio is not None and not 0.0 < self.reduction_ratio <= 1.0:
            raise UsageError(f"reduction_ratio={self.reduction_ratio}: expected a ratio in (0, 1]")
        if self.attention_order and self.positions == "original":
            raise UsageError("prumerge: attention_order=True gives tokens new places; it needs positions=contiguous")
        prefix, layer = adapter.tower_prefix, len(adapter.tower_layers) - 1
        signals = {
            "attention": TowerSignal(layer, partial(wide_attention, prefix=prefix)),
            "keys": TowerSignal(layer, partial(wide_keys, prefix=prefix)),
        }
        if self.shared_ratio:
            signals["ratio"] = TowerSignal(layer, partial(_ratio_of_call, prefix=prefix))
        assumes = None
        if self.keep is None and (self.reduction_ratio is None or self.plus):
            ratio = "the published mean" if self.reduction_ratio is None else "the given ratio"
            spaced = ", and attention that has nothing to do with the places of the spaced tokens" if self.plus else ""
            assumes = f"{ratio} of outliers{spaced}"
        stage = PromptStage(partial(self._select, prefix), self.positions, signals)
        return [replace(stage, expected=self._expected, assumes=assumes)]

    def _expected(self, alive: Alive) -> int:
        if self.keep is not None:
            return alive.after(sum(crop_budgets(alive.crops, self.keep, None)))
        ratio = TYPICAL_RATIO if self.reduction_ratio is None else self.reduction_ratio
        kept = [expected_number(tokens, ratio, self.plus) for tokens in alive.crops]
        left = [min(tokens, count + 1) for tokens, count in zip(alive.crops, kept, strict=True)]
        return alive.after(sum(left))

    def _select(self, prefix: int, view: ImageView) -> Tensor | Selection:
        assert view.tower is not None
        crops = crop_tokens(view, "attention")
        attention, keys, features = packed(view, "attention")[:, 0], packed(view, "keys"), packed_features(view, prefix)
        if view.tower.features is None:
            attention = attention * (view.tower.signals["attention"].numel() / sum(map(len, crops)))
        chosen = self._kept(view, [attention[tokens] for tokens in crops])
        if all(len(kept) == len(tokens) for (kept, _), tokens in zip(chosen, crops, strict=True)):
            return torch.ones_like(view.candidates)
        groups = []
        for tokens, (kept, extra) in zip(crops, chosen, strict=True):
            seats = tokens[kept]
            order = 2 * (tokens[:1].expand_as(seats) if self.attention_order else seats)
            if len(kept) in (0, len(tokens)):
                groups.append(Group(seats, order))
                continue
            made = merge(attention[tokens], keys[tokens], features[tokens], kept)
            groups.append(Group(seats, order, made[:-1]))
            if extra:
                dropped = tokens[~torch.isin(tokens, seats)]
                last = order[:1] if self.attention_order else 2 * tokens[-1:] + 1
                groups.append(Group(dropped[-1:], last, made[-1:], dropped, torch.zeros_like(dropped)))
        return seated(view, groups)

    def _kept(self, view: ImageView, attention: list[Tensor]) -> list[tuple[Tensor, bool]]:
        """Return what each crop keeps, as indices into its tokens, and whether an extra token is added."""
        if self.keep is not None:
            budgets = zip(attention, crop_budgets(list(map(len, attention)), self.keep, None), strict=True)
            extras = [(a, budget, 1 < budget < len(a)) for a, budget in budgets]
            return [(kept_number(a, budget - extra, self.plus), extra) for a, budget, extra in extras]
        assert view.tower is not None
        if self.reduction_ratio is not None:
            ratio = self.reduction_ratio
        elif self.shared_ratio:
            ratio = float(view.tower.signals["ratio"][0])
        else:
            ratio = outlier_ratio(torch.cat(attention))
        return [(kept_tokens(a, ratio, self.plus), True) for a in attention]


def _ratio_of_call(call: AttentionCall, prefix: int) -> Tensor:
    """Return the adaptive ratio over all crops that the tower encodes together, once for each of them (K,)."""
    attention = wide_attention(call, prefix)
    return torch.full(attention.shape[:1], outlier_ratio(attention), dtype=torch.float64)


METHOD = PruMerge
