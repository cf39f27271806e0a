"""Packing all turns of an image behind one image prefix: exact, and many times more supervision per second.

A token sees the prefix and the earlier tokens of its own turn; positions restart behind the prefix in every turn.
Yes/no turns also share their first words "is there a".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vislm.training.tiny.samples import Weighted
from vislm.training.tiny.vocabulary import EOS, IMAGE, encode

PREFIX = [*encode("<s> user :"), *[IMAGE] * 64]
STEM = encode("is there a")


@dataclass(frozen=True)
class Packed:
    """B packed sequences of length L with n supervised positions."""

    ids: Tensor
    """(B, L)."""
    positions: Tensor
    """(B, L)."""
    mask: Tensor
    """(B, 1, L, L) bool, True = may attend."""
    where: Tensor
    """(n, 2): row and column whose next token is supervised."""
    targets: Tensor
    """(n,)."""
    weights: Tensor
    """(n,)."""
    turn: Tensor
    """(n, 2): number of the turn within its image, and of the token within its answer."""


def pack(conversations: Sequence[Sequence[Weighted]]) -> Packed:
    """Pack the turns of each image."""
    rows = [_pack_row(turns) for turns in conversations]
    length = max(len(ids) for ids, *_ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    segment = torch.full((len(rows), length), -1)
    where, targets, weights, turn = [], [], [], []
    for number, (tokens, places, segments, supervised) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        positions[number, : len(tokens)] = torch.tensor(places)
        segment[number, : len(tokens)] = torch.tensor(segments)
        for column, target, weight, n, k in supervised:
            where.append((number, column))
            targets.append(target)
            weights.append(weight)
            turn.append((n, k))
    return Packed(
        ids,
        positions,
        _mask(segment),
        torch.tensor(where),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(turn),
    )


_PREFIX, _STEM = 0, 1
"""Segments; turn n is segment 2n + 2, or 2n + 3 when it continues the stem."""


def _pack_row(turns: Sequence[Weighted]) -> tuple[list[int], list[int], list[int], list[tuple]]:
    ids, positions, segments = list(PREFIX), list(range(len(PREFIX))), [_PREFIX] * len(PREFIX)
    supervised: list[tuple[int, int, float, int, int]] = []
    stemmed = [w.turn.kind == "presence" for w in turns]
    if any(stemmed):
        ids += STEM
        positions += range(len(PREFIX), len(PREFIX) + len(STEM))
        segments += [_STEM] * len(STEM)
    for number, (weighted, has_stem) in enumerate(zip(turns, stemmed, strict=True)):
        question = [*encode(weighted.turn.question), *encode("assistant :")]
        answer = (
            [*encode(weighted.turn.answer), EOS] if weighted.later is not None else encode(weighted.turn.answer)[:1]
        )
        start = len(PREFIX) + (len(STEM) if has_stem else 0)
        tokens = [*question[len(STEM) if has_stem else 0 :], *answer[:-1]]
        first = len(ids) + len(tokens) - len(answer)
        for k, target in enumerate(answer):
            weight = weighted.first if k == 0 else weighted.later
            supervised.append((first + k, target, float(weight or 0.0), number, k))
        ids += tokens
        positions += range(start, start + len(tokens))
        segments += [2 * number + (3 if has_stem else 2)] * len(tokens)
    return ids, positions, segments, supervised


def _mask(segment: Tensor) -> Tensor:
    length = segment.shape[1]
    query, key = segment[:, :, None], segment[:, None, :]
    allowed = (key == query) | (key == _PREFIX) | ((key == _STEM) & (query % 2 == 1) & (query > _STEM))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (allowed & causal)[:, None]


def packed_logits(model: LlavaForConditionalGeneration, packed: Packed, features: Tensor) -> Tensor:
    """Return logits (n, V) at the supervised positions; features (B, 64, C) are the projected patches."""
    decoder = model.model.language_model
    embeds = decoder.embed_tokens(packed.ids)
    embeds = torch.cat([embeds[:, :3], features, embeds[:, 3 + features.shape[1] :]], 1)
    hidden = decoder(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[packed.where[:, 0], packed.where[:, 1]])
