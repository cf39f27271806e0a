"""The start of the language model: what its heads look at before any training."""

from __future__ import annotations

import copy

import pytest
import torch

from vislm.training.tiny.model import build_model, set_embeddings, start_language_model
from vislm.training.tiny.vocabulary import IDS, IMAGE, encode


@pytest.fixture(scope="module")
def before():
    torch.manual_seed(0)
    model = build_model().eval()
    set_embeddings(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def model(before):
    model = copy.deepcopy(before)
    model.tie_weights()
    model.set_attn_implementation("eager")
    start_language_model(model, torch.Generator().manual_seed(1))
    return model


def _attention(model, embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.model.language_model(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions


def test_sizes(before) -> None:
    parts = before.model.vision_tower, before.model.multi_modal_projector, before.model.language_model
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [860_416, 33_024, 765_696]
    assert before.lm_head.weight is before.model.language_model.embed_tokens.weight


def test_embeddings_are_orthonormal(before) -> None:
    words = before.model.language_model.embed_tokens.weight
    torch.testing.assert_close(words @ words.T, torch.eye(85), rtol=0, atol=1e-5)


def test_plurals_are_moved_towards_their_singular_and_patches_marked(before, model) -> None:
    old, new = (m.model.language_model.embed_tokens.weight for m in (before, model))
    torch.testing.assert_close(new[IDS["dogs"]] @ old[IDS["dog"]], torch.tensor(0.8), rtol=0, atol=1e-5)
    torch.testing.assert_close(new[IDS["dogs"]].norm(), torch.tensor(1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(new[IDS["fish"]], old[IDS["fish"]])
    added = model.model.multi_modal_projector.linear_2.bias - before.model.multi_modal_projector.linear_2.bias
    torch.testing.assert_close(added, 0.6 * old[IMAGE], rtol=0, atol=1e-6)


def test_attention_copies(model) -> None:
    for layer in model.model.language_model.layers:
        copied = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        torch.testing.assert_close(copied, 2 / 128**0.5 * torch.eye(128), rtol=0, atol=1e-5)


def test_a_word_finds_the_patches_that_are_aligned_with_it(model) -> None:
    """Perfectly aligned patches: 4 of 64 show a dog, the rest background; the word dog stands behind them."""
    words = model.model.language_model.embed_tokens.weight.detach()
    patches = (words[IDS["<unk>"]] + 0.6 * words[IMAGE]).repeat(64, 1)
    shown = [20, 21, 28, 29]
    patches[shown] = words[IDS["dog"]] + words[IDS["red"]] + 0.6 * words[IMAGE]
    prompt = encode("is there a dog in the image ? assistant :")
    text = words[prompt]
    embeds = torch.cat([words[encode("<s> user :")], patches, text])[None]
    first = _attention(model, embeds)[0][0, :, 3 + 64 + prompt.index(IDS["dog"])]
    found = first[:, [3 + k for k in shown]].sum(-1)
    assert (found > 0.25).all(), found
    absent = _attention(model, torch.cat([embeds[:, :70], words[[IDS["cup"]]][None]], 1))[0][0, :, -1]
    assert absent[:, [3 + k for k in shown]].sum(-1).mean() < found.mean() / 4


@pytest.mark.parametrize(("head", "distances"), [(0, {3}), (1, {5, 6}), (2, {3}), (3, {5, 6})])
def test_local_heads_look_back_to_the_asked_word(model, head: int, distances: set[int]) -> None:
    """Layer 1 seen alone: of all words of a question, the answer position attends most to the asked one."""
    words = model.model.language_model.embed_tokens.weight.detach()
    inner = model.model.language_model
    states = words[encode("there is a the in image where what how many are color user and describe")][None]
    normed = inner.layers[1].input_layernorm(states)
    where = torch.arange(states.shape[1])[None]
    with torch.no_grad():
        _, weights = inner.layers[1].self_attn(
            normed, position_embeddings=inner.rotary_emb(normed, where), attention_mask=None
        )
    assert states.shape[1] - 1 - int(weights[0, head, -1].argmax()) in distances
