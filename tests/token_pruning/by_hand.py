"""Decoder layers called one by one with full attention maps: what the language stages are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

START = 3
"""First visual column of the test prompts."""


@dataclass
class Point:
    """The state behind a decoder layer: one prompt, S columns alive."""

    hidden: Tensor
    """(S, C)."""
    attention: Tensor
    """(H, S, S) of the layer that has just run."""
    following: Callable[[], Tensor]
    """The attention (H, S, S) that the next layer would compute on ``hidden``."""
    positions: Tensor
    """(S,)."""


@torch.no_grad()
def prefill(model, inputs, cut: Callable[[int, Point], tuple[Tensor, Tensor] | None]) -> tuple[Tensor, list[int]]:
    """Return the last row's logits and the columns of every layer; ``cut`` gives (hidden, positions) behind a layer."""
    inner, language = model.model, model.model.language_model
    features = inner.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    ids = inputs["input_ids"]
    hidden = inner.get_input_embeddings()(ids)
    hidden = hidden.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), torch.cat(list(features)))
    positions, columns = torch.arange(ids.shape[1]), []
    layers = list(language.layers)
    for number, layer in enumerate(layers):
        columns.append(hidden.shape[1])
        attention = _attention(language, layer, hidden, positions)
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
        rotary = language.rotary_emb(hidden, position_ids=positions[None])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions[None])
        if number + 1 < len(layers):
            following = layers[number + 1]
            point = Point(
                hidden[0],
                attention,
                lambda h=hidden, p=positions, n=following: _attention(language, n, h, p),
                positions,
            )
            changed = cut(number, point)
            if changed is not None:
                hidden, positions = changed[0][None], changed[1]
    return model.lm_head(language.norm(hidden))[0, -1], columns


def _attention(language, layer, hidden: Tensor, positions: Tensor) -> Tensor:
    cos, sin = language.rotary_emb(hidden, position_ids=positions[None])
    normed, module = layer.input_layernorm(hidden), layer.self_attn
    query, key = (
        p(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.q_proj, module.k_proj)
    )
    query, key = (
        x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin for x in (query, key)
    )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return causal_softmax(query @ key.transpose(-1, -2) * module.scaling)[0]


def causal_softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the keys up to each query."""
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def raters_of(model, inputs) -> list[int]:
    """Return SparseVLM's raters: places in the text behind the image."""
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output[0]
    text = model.get_input_embeddings()(inputs["input_ids"][0, START + len(features) :])
    m = (features @ text.T).softmax(-1).mean(0)
    return (m > m.mean()).nonzero().flatten().tolist()


def peaks(x: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Return the means and the centers of density-peak clusters, by plain loops."""
    n = len(x)
    d = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    rho = [torch.tensor(-sum(v * v for v in sorted(row)[:count]) / count).exp().item() for row in d]
    order = sorted(range(n), key=lambda i: (-rho[i], i))
    delta = [min((d[i][j] for j in order[: order.index(i)]), default=max(map(max, d))) for i in range(n)]
    centers = sorted(range(n), key=lambda i: (-rho[i] * delta[i], i))[:count]
    label = [centers.index(i) if i in centers else min(range(count), key=lambda c: d[i][centers[c]]) for i in range(n)]
    return torch.stack([x[[i for i in range(n) if label[i] == c]].mean(0) for c in range(count)]), centers
