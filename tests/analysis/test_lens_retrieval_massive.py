"""The lens, retrieval scores, massive activations."""

from __future__ import annotations

import models
import pytest
import torch

from vislm import load_lmm
from vislm.analysis.lens import read_layers
from vislm.analysis.lmm_retrieval import Trial, needle_scores
from vislm.analysis.massive import edited_activations, largest_activations, next_token_loss, watch_blocks
from vislm.analysis.retrieval import box_tokens, find_needle, retrieval_scores, rouge1_recall, strongest
from vislm.analysis.sink_dims import find_sink_dims
from vislm.data.scenes import generate_scenes
from vislm.errors import UsageError


@pytest.fixture(scope="module")
def lmm():
    return load_lmm()


@pytest.fixture(scope="module")
def inputs(lmm):
    return lmm.prepare([next(generate_scenes(1, 5)).image], ["is there a car in the image ?"])


def test_the_lens_is_the_head_on_every_hidden_state(lmm, inputs) -> None:
    with torch.no_grad():
        out = lmm.model(**inputs, output_hidden_states=True)
        norm, head = lmm.adapter.language_model.norm, lmm.model.get_output_embeddings()
        states = out.hidden_states
        for readout in ("norm_and_head", "input_embedding"):
            lens = read_layers(lmm, inputs, readout)
            assert lens.log_probability.shape == (4, 85)
            torch.testing.assert_close(lens.log_probability[-1], out.logits[0, -1].log_softmax(-1))
            for layer in range(3):
                x = states[layer + 1][0, -1]
                table = lmm.model.get_input_embeddings().weight
                expected = head(norm(x)) if readout == "norm_and_head" else table @ x
                torch.testing.assert_close(lens.log_probability[layer], expected.log_softmax(-1), atol=1e-4, rtol=1e-4)
    probability, ids = lens.top(3)
    assert torch.equal(ids[-1], out.logits[0, -1].topk(3).indices)
    torch.testing.assert_close(lens.probability(int(ids[-1, 0]))[-1], probability[-1, 0])
    with pytest.raises(UsageError, match="norm_and_head"):
        read_layers(lmm, inputs, "head")
    with pytest.raises(UsageError, match="2 prompts"):
        read_layers(lmm, {k: v.repeat(2, *(1,) * (v.dim() - 1)) for k, v in inputs.items()})


def test_scores_of_copied_tokens() -> None:
    prompt = [9, 4, 5, 6, 4, 9]
    top = torch.tensor([[[1, 2]], [[4, 2]], [[3, 2]], [[1, 5]]])  # (S, L, H)
    produced = [4, 4, 6, 4]
    found = retrieval_scores(top, produced, prompt, (1, 4))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]))  # 4 at 1, 6 at 3, 4 at 1 again; column 4 is outside
    once = retrieval_scores(top, produced, prompt, (1, 4), repeats="paper_counts_once")
    torch.testing.assert_close(once, torch.tensor([[2 / 3, 0.0]]))
    assert strongest(found) == [(0, 0, pytest.approx(1.0))]
    for wrong in ((3, 3), (0, 7)):
        with pytest.raises(UsageError, match="span"):
            retrieval_scores(top, produced, prompt, wrong)
    with pytest.raises(UsageError, match="4 steps"):
        retrieval_scores(top, produced[:2], prompt, (1, 4))


def test_needles() -> None:
    assert find_needle([1, 2, 3, 4, 5, 6], [4, 3, 5]) == (2, 5)
    assert find_needle(list(range(50)), [99, *range(20, 39)]) == (19, 39)  # 19 of 20 ids
    with pytest.raises(UsageError, match="more than 90%"):
        find_needle([1, 2, 3], [1, 9])
    with pytest.raises(UsageError, match="empty"):
        find_needle([1], [])
    assert rouge1_recall("Eat a Sandwich there", "eat a sandwich") == 1.0
    assert rouge1_recall("a b", "a a b c") == 0.5


def test_needle_trials_of_a_model(lmm) -> None:
    scene = next(generate_scenes(1, 5)).image
    needle = "there is a green car ,"
    copied = Trial(scene, "describe the image . " + needle, needle)
    missed = Trial(scene, "is there a car in the image ?", "is there a car")
    scores, counted = needle_scores(lmm, [copied, missed])
    assert counted == 1
    assert scores.shape == (4, 4)
    assert 0 < scores.max() <= 1
    torch.testing.assert_close(scores * 6, (scores * 6).round())  # six tokens in the needle
    with pytest.raises(UsageError, match="none of 1 answers"):
        needle_scores(lmm, [missed])


def test_tokens_of_a_box() -> None:
    assert box_tokens((0.0, 0.0, 0.5, 0.5), (2, 4)) == [0, 1]
    assert box_tokens((0.5, 0.5, 1.0, 1.0), (2, 4), start=10, row_stride=5) == [17, 18]
    for wrong in ((0.5, 0.0, 0.5, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 0.01, 0.01)):
        with pytest.raises(UsageError, match="box"):
            box_tokens(wrong, (2, 4))


def test_published_massive_activations_are_called_so() -> None:
    """LLaMA-2-7B: the first token's dimensions 2533 and 1415, 767.6 and -458.55 where the median is below 1."""
    hidden = 0.05 * torch.randn(1, 6, 4096, generator=torch.Generator().manual_seed(0))
    hidden[0, 0, 2533], hidden[0, 0, 1415], hidden[0, 3, 7] = 767.6, -458.55, 40.0
    found = largest_activations(hidden)
    assert found.dim[0].tolist() == [2533, 1415, 7]
    assert found.token[0].tolist() == [0, 0, 3]
    torch.testing.assert_close(found.top[0], torch.tensor([767.6, -458.55, 40.0]))
    assert found.massive[0].tolist() == [True, True, False]
    valid = torch.tensor([[False, True, True, True, True, True]])
    assert largest_activations(hidden, valid).dim[0, 0] == 7


def test_activations_behind_blocks_can_be_set() -> None:
    model, inputs = models.llava(), {"input_ids": models.prompt(7, 8), "pixel_values": models.pixels()}
    layers = model.model.language_model.layers
    with torch.no_grad():
        plain = model(**inputs).logits
        with watch_blocks(list(layers)) as found:
            model(**inputs)
        assert len(found) == 5
        place = int(found[1].token[0, 0]), int(found[1].dim[0, 0])
        with watch_blocks(list(layers)) as edited, edited_activations(layers[1], [place], "set_zero"):
            zero = model(**inputs).logits
        with edited_activations(layers[1], [place], "set_mean", [float(found[1].top[0, 0])]):
            same = model(**inputs).logits
        torch.testing.assert_close(same, plain)
        assert not torch.allclose(zero, plain, atol=1e-3)
        assert edited[2].top[0, 0] != found[2].top[0, 0]
        torch.testing.assert_close(model(**inputs).logits, plain)
    ids = inputs["input_ids"]
    expected = torch.nn.functional.cross_entropy(plain[0, :-1], ids[0, 1:])
    torch.testing.assert_close(next_token_loss(plain, ids)[0], expected)
    half = torch.ones_like(ids)
    half[:, :10] = 0
    expected = torch.nn.functional.cross_entropy(plain[0, 10:-1], ids[0, 11:])
    torch.testing.assert_close(next_token_loss(plain, ids, half)[0], expected)
    with pytest.raises(UsageError, match="0 means for 1 places"), edited_activations(layers[0], [(0, 0)], "set_mean"):
        pass
    with pytest.raises(UsageError, match="expected 'set_zero'"), edited_activations(layers[0], [], "drop"):  # pyright: ignore
        pass


def test_dimensions_of_sinks(lmm) -> None:
    scene = next(generate_scenes(1, 5)).image
    assert find_sink_dims(lmm, scene, "is there a car in the image ?") == ()  # 20 > sqrt(128)
    found = find_sink_dims(lmm, scene, "is there a car in the image ?", tau=1.5)
    assert found
    assert all(0 <= dim < 128 for dim in found)
    assert set(find_sink_dims(lmm, scene, "is there a car in the image ?", tau=2.5)) < set(found)
