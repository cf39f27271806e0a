"""Architecture and initialisation of vislm-tiny.

The language model starts as a machine that can match words with patches: without this start several hundred more steps
pass before it looks at the image at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vislm.data.scene_categories import CATEGORIES
from vislm.data.turns import plural
from vislm.training.tiny.vocabulary import BOS, EOS, IDS, IMAGE, PAD

WIDTH, HEADS, HEAD_DIM = 128, 4, 32
HALF = HEAD_DIM // 2
FAST, SLOW = range(8), range(8, 16)
"""Rotary pairs (i, i + 16): the fast ones turn within a few tokens, the slow ones hardly over the whole prompt."""

HEAD_TYPES = ("MMMM", "3S3S", "M3S-", "M3--")
"""Decoder layer -> its heads: M matches equal embeddings, 3 and S look about 3 and 5.5 tokens back, - is plain."""
DISTANCES = {"3": 3.0, "S": 5.5}


def build_model() -> LlavaForConditionalGeneration:
    """Return the model with library initialisation, in float32."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=len(IDS),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, image_seq_length=64)
    config.image_token_id = IMAGE
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    return model


def orthogonal(generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix (128, 128)."""
    q, r = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    return q * r.diagonal().sign()


@torch.no_grad()
def set_embeddings(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Give the words mutually orthogonal embeddings of unit norm, to which the tower is aligned first."""
    model.model.language_model.embed_tokens.weight.copy_(orthogonal(generator)[: len(IDS)])


@torch.no_grad()
def start_language_model(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Initialise the language model for stage B, after the tower has been aligned with the words."""
    words = model.model.language_model.embed_tokens.weight
    for name in CATEGORIES:
        if plural(name) != name:
            words[IDS[plural(name)]] = 0.8 * words[IDS[name]] + 0.6 * words[IDS[plural(name)]]
    marker = words[IMAGE].clone()
    model.model.multi_modal_projector.linear_2.bias += 0.6 * marker  # a direction shared by all patches and no word
    any_word = words.sum(0)
    any_word = any_word / any_word.norm()
    for layer, types in zip(model.model.language_model.layers, HEAD_TYPES, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        query, key = _plain(attention.q_proj.weight, generator), _plain(attention.k_proj.weight, generator)
        for head, kind in enumerate(types):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            if kind == "M":
                _match(query[rows], key[rows], any_word, marker, generator)
            elif kind in DISTANCES:
                _look_back(query[rows], key[rows], any_word, DISTANCES[kind])
        copy, gain = orthogonal(generator), math.sqrt(2.0 / math.sqrt(WIDTH))
        attention.v_proj.weight.copy_(gain * copy)
        attention.o_proj.weight.copy_(gain * copy.T)
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) / math.sqrt(WIDTH))
        mlp.down_proj.weight.copy_(0.004 * torch.randn(mlp.down_proj.weight.shape, generator=generator))


def _plain(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def _match(query: Tensor, key: Tensor, any_word: Tensor, marker: Tensor, generator: torch.Generator) -> None:
    """Let equal embeddings attend to each other whatever their distance, and any word prefer patches to itself."""
    shared = 2.0 * orthogonal(generator)[: 2 * len(SLOW)]
    rows = torch.tensor([*SLOW, *(i + HALF for i in SLOW)])
    query[rows], key[rows] = shared, shared
    query[SLOW[-1]], key[SLOW[-1]] = 1.8 * any_word, 1.8 * marker


def _look_back(query: Tensor, key: Tensor, any_word: Tensor, distance: float) -> None:
    """Put the attention's peak ``distance`` tokens back, whatever the words are."""
    for i in FAST:
        angle = 10000.0 ** (-i / HALF) * distance
        query[i], query[i + HALF] = 1.6 * math.cos(angle) * any_word, -1.6 * math.sin(angle) * any_word
        key[i], key[i + HALF] = 1.6 * any_word, 0.0
