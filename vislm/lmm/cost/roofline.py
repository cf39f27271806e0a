"""The least time that a card needs for an expected run: a layer computes or reads its weights, whichever is longer.

A count of FLOPs promises more than pruning can give: the fewer tokens are left, the more of the time goes into reading
the weights once. Decoding reads all of them for every token, so that a smaller cache hardly shows at batch 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from vislm.lmm.adapters import Adapter
from vislm.lmm.cost.expectation import Expectation
from vislm.lmm.cost.flops import DecoderShape


@dataclass(frozen=True)
class Card:
    """A processor's limits."""

    name: str
    flops: float
    """FLOP/s of dense 16-bit products."""
    bandwidth: float
    """Bytes/s of its memory."""

    def seconds(self, flops: float, moved: float) -> float:
        """Return the time of an operation that computes ``flops`` and moves so many bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


A100 = Card("A100 (312 TFLOP/s, 2.0 TB/s)", 312e12, 2.0e12)


def first_token_seconds(adapter: Adapter, cost: Expectation, card: Card = A100, bytes_per_weight: int = 2) -> float:
    """Return the least time of tower, projector and prefill."""
    tower, decoder = adapter.tower_shape, DecoderShape.of(adapter.text_config)
    width = bytes_per_weight * tower.width
    per_layer = width * (4 * tower.width + tower.mlp_matrices * tower.mlp_width)
    patches = sum(cost.tower_tokens)
    total = 0.0
    for n in cost.tower_tokens:
        total += card.seconds(cost.flops["tower"] * n / patches, per_layer + 2 * n * width)
    total += card.seconds(cost.flops["projector"], 0.0)
    for n in cost.columns:
        keys = decoder.kv_bytes([n], bytes_per_weight)
        moved = bytes_per_weight * (_layer_weights(decoder) + 2 * n * decoder.width) + keys
        total += card.seconds(decoder.layer_flops([n]), moved)
    head = decoder.width * decoder.vocabulary
    return total + card.seconds(2 * head, bytes_per_weight * head)


def decode_bytes(adapter: Adapter, cost: Expectation, bytes_per_weight: int = 2) -> int:
    """Return what one decode step reads: the decoder's weights and the cache."""
    decoder = DecoderShape.of(adapter.text_config)
    weights = decoder.layers * _layer_weights(decoder) + decoder.width * decoder.vocabulary
    return bytes_per_weight * weights + cost.kv_bytes


def _layer_weights(decoder: DecoderShape) -> int:
    inner = decoder.heads * decoder.head_dim
    attention = decoder.width * (2 * inner + 2 * decoder.kv_heads * decoder.head_dim)
    return attention + decoder.mlp_matrices * decoder.width * decoder.mlp_width
