"""Packed turns must give what asking them one by one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scenes import generate_scenes
from vislm.data.turns import Turn
from vislm.training.tiny.model import build_model, set_embeddings, start_language_model
from vislm.training.tiny.packing import PREFIX, STEM, pack, packed_logits
from vislm.training.tiny.pixels import to_pixels
from vislm.training.tiny.samples import Weighted, all_presence, dense, mixed
from vislm.training.tiny.vocabulary import EOS, IDS, encode


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    built = build_model().eval()
    set_embeddings(built, generator)
    start_language_model(built, generator)
    return built


def _conversations(seed: int, n: int = 3):
    rng = np.random.default_rng(seed)
    scenes = list(generate_scenes(n, seed))
    kinds = (all_presence, lambda s: dense(s, rng, True), lambda s: mixed(s, rng, 4, 2))
    return scenes, [kinds[k % 3](scene) for k, scene in enumerate(scenes)]


def _supervised(conversations) -> list[tuple[int, Weighted, list[int]]]:
    """Image number, turn and answer ids of every turn, in order."""
    rows = []
    for number, turns in enumerate(conversations):
        for weighted in turns:
            answer = encode(weighted.turn.answer)
            rows.append((number, weighted, answer[:1] if weighted.later is None else [*answer, EOS]))
    return rows


@torch.no_grad()
def test_packed_logits_are_those_of_single_turns(model) -> None:
    scenes, conversations = _conversations(5)
    pixels = to_pixels([s.image for s in scenes])
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    packed = pack(conversations)
    logits = packed_logits(model, packed, model.model.multi_modal_projector(hidden[:, 1:]))
    at = 0
    for number, weighted, answer in _supervised(conversations):
        prompt = [*PREFIX, *encode(weighted.turn.question), *encode("assistant :")]
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        single = model(input_ids=ids, pixel_values=pixels[number : number + 1]).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(logits[at : at + len(answer)], single, rtol=0, atol=1e-4)
        margin = logits[at] @ _yes_no() - single[0] @ _yes_no()
        assert abs(margin) < 1e-5 * max(1.0, float(single[0].abs().max()))
        at += len(answer)
    assert at == len(packed.targets)


def _yes_no() -> torch.Tensor:
    direction = torch.zeros(len(IDS))
    direction[IDS["yes"]], direction[IDS["no"]] = 1.0, -1.0
    return direction


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_what_is_supervised(seed: int, n: int) -> None:
    _, conversations = _conversations(seed, n)
    packed = pack(conversations)
    rows = _supervised(conversations)
    assert packed.targets.tolist() == [target for *_, answer in rows for target in answer]
    weights = [w.first if k == 0 else w.later for _, w, answer in rows for k in range(len(answer))]
    torch.testing.assert_close(packed.weights, torch.tensor(weights, dtype=packed.weights.dtype))
    first = packed.where[packed.turn[:, 1] == 0]
    assert (packed.ids[first[:, 0], first[:, 1]] == IDS[":"]).all()


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_a_token_sees_exactly_the_tokens_of_its_single_prompt(seed: int) -> None:
    """The tokens a supervised position sees, in order of their positions, are the turn's own prompt."""
    _, (turns,) = _conversations(seed, 1)
    packed = pack([turns])
    rows = _supervised([turns])
    at = 0
    for _, weighted, answer in rows:
        for k in range(len(answer)):
            column = int(packed.where[at, 1])
            seen = packed.mask[0, 0, column].nonzero().flatten()
            order = seen[packed.positions[0, seen].argsort()]
            expected = [*PREFIX, *encode(weighted.turn.question), *encode("assistant :"), *answer[:k]]
            assert packed.ids[0, order].tolist() == expected
            assert packed.positions[0, order].tolist() == list(range(len(expected)))
            at += 1


def test_yes_no_questions_share_their_stem() -> None:
    scene = next(generate_scenes(1, 0))
    questions = [len(encode(w.turn.question)) + 2 for w in all_presence(scene)]
    packed = pack([all_presence(scene)])
    assert packed.ids.shape[1] == len(PREFIX) + len(STEM) + sum(n - len(STEM) for n in questions)


def test_no_answer_leaks_into_another_turn(model) -> None:
    """Changing one turn's question and answer leaves all other logits as they are."""
    turns = [Weighted(Turn("colour", f"what color is the {name} ?", "red .", name)) for name in CATEGORIES[:3]]
    changed = [turns[0], Weighted(Turn("colour", "what color is the ball ?", "blue .", "ball")), turns[2]]
    features = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (packed_logits(model, pack([t]), features) for t in (turns, changed))
    torch.testing.assert_close(one[:3], two[:3])
    torch.testing.assert_close(one[6:], two[6:])
    assert (one[3] - two[3]).abs().max() > 1e-3
