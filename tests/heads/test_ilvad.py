"""ILVAD's saliency, and the two generations behind one call."""

from __future__ import annotations

import math

import models
import pytest
import torch
from eager import Prompt, check_against_eager, eager_logits, plain
from running import generate, one_image

from vislm import FastV, attach, load_lmm
from vislm.data.scenes import generate_scenes
from vislm.errors import UsageError
from vislm.heads.ilvad import ILVAD, log_saliency, minmax, top_half

ALPHA, BETA, ACTIVATION = 3.0, 0.4, 1.3
METHOD = ILVAD(alpha=ALPHA, beta=BETA, activation=ACTIVATION, layers=(1, 2, 3), draft_tokens=5)


def largest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def slow_saliency(maps: torch.Tensor, alpha: float, activation: float) -> list[float]:
    """ln E by loops, of maps (L, V)."""
    layers, count = maps.shape
    active = [[maps[n, k] > activation * maps[n].mean() for k in range(count)] for n in range(layers)]
    jumps = [float(sum(active[n][k] and not active[n - 1][k] for n in range(1, layers))) for k in range(count)]
    overall = maps.mean(0)
    jumps = [jump if overall[k] > overall.mean() else 0.0 for k, jump in enumerate(jumps)]
    mean = sum(jumps) / count
    std = math.sqrt(sum((jump - mean) ** 2 for jump in jumps) / (count - 1))
    jumps = [min(max(jump, mean - 3 * std), mean + 3 * std) for jump in jumps]
    low, high = min(jumps), max(jumps)
    return [alpha * (jump - low) / (high - low) if high > low else 0.0 for jump in jumps]


def draft_maps(model, inputs, tokens: int) -> torch.Tensor:
    """Attention (L, V) on the image in a plain draft: mean over steps 2.. and the half of heads that look most."""
    _, out, _ = generate(model, inputs, max_new_tokens=tokens)
    seen: dict[int, torch.Tensor] = {}

    def record(logits, mask, layer):
        weights = plain(logits, mask, layer)
        rows = []
        for row in range(Prompt.length, logits.shape[2]):
            image = weights[0, :, row, Prompt.start : Prompt.end]
            rows.append(image[largest(image.sum(-1).tolist(), 2)].mean(0))
        seen[layer] = torch.stack(rows).mean(0)
        return weights

    eager_logits(model, inputs, out.sequences[:, : Prompt.length + tokens - 1], record)
    return torch.stack([seen[layer] for layer in sorted(seen)])


def test_session_equals_explicit_matrices() -> None:
    model = models.llava()
    saliency = torch.tensor(slow_saliency(draft_maps(model, one_image("llava"), 5), ALPHA, ACTIVATION))
    assert 0 < int((saliency > 0).sum()) < len(saliency)

    def edit(logits, mask, layer):
        weights = plain(logits, mask, layer)
        if layer not in (1, 2, 3):
            return weights
        start, end = Prompt.start, Prompt.end
        original, scores = weights[0].clone(), []
        for row in range(end, logits.shape[2]):
            a = original[:, row]
            mass = (a[:, start:end] * saliency).sum(-1)
            looks = largest((mass / a[:, start:end].sum(-1)).tolist(), 2)
            scores.append(mass[looks].mean().item())
            if row < Prompt.length - 1:
                continue
            reads = largest(a[:, end : row + 1].sum(-1).tolist(), 2)
            low, high = min(scores), max(scores)
            gain = torch.tensor([(score - low) / (high - low) + BETA for score in scores])
            new = a.clone()
            new[looks, start:end] *= saliency.exp()
            new[reads, end : row + 1] *= gain
            weights[0, :, row] = new / new.sum(-1, keepdim=True)
        return weights

    check_against_eager(METHOD, edit, model=model)


@pytest.mark.parametrize("seed", range(5))
def test_saliency_by_loops(seed: int) -> None:
    maps = torch.rand(1, 6, 12, generator=torch.Generator().manual_seed(seed)) ** 4
    expected = torch.tensor(slow_saliency(maps[0], 5.0, 2.0))
    valid = torch.ones(1, 12, dtype=torch.bool)
    torch.testing.assert_close(log_saliency(maps, valid, 5.0, 2.0)[0], expected)
    padded = torch.nn.functional.pad(maps, (2, 3), value=9.0)  # slots without a token do not count
    there = torch.nn.functional.pad(valid, (2, 3))
    torch.testing.assert_close(log_saliency(padded, there, 5.0, 2.0)[0, 2:14], expected)


def test_ranges_and_ties() -> None:
    assert minmax(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).tolist() == [0.0, 1.0, 0.0]
    assert minmax(torch.ones(3), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3
    assert top_half(torch.tensor([1.0, 2.0, 2.0, 0.0, 0.0])[None, :, None]).flatten().tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_draft_that_ends_early_counts_as_far_as_it_goes() -> None:
    """Answers of different lengths in one batch, with an end that the drafts meet; once after the first token."""
    model = models.llava()
    prompts, pixels = [models.prompt(7, 8), models.prompt(9, 3, 4)], models.pixels(2)
    singles = [{"input_ids": ids, "pixel_values": pixels[i : i + 1]} for i, ids in enumerate(prompts)]
    drafts = [generate(model, single)[1].sequences[0, single["input_ids"].shape[1] :].tolist() for single in singles]
    for end in (drafts[0][0], drafts[0][2]):
        options = {"eos_token_id": end, "max_new_tokens": 4}
        batch = {**models.left_pad(*prompts), "pixel_values": pixels}
        together, _, run = generate(model, batch, METHOD, **options)
        lengths = run.memory[0]["draft_tokens"].tolist()
        assert lengths[0] == drafts[0].index(end) + 1
        for i, single in enumerate(singles):
            logits, _, alone = generate(model, single, METHOD, **options)
            assert alone.memory[0]["draft_tokens"].tolist() == [lengths[i]]
            shared = min(len(logits), len(together))
            torch.testing.assert_close(together[:shared, i], logits[:shared, 0], atol=2e-4, rtol=1e-4)
        if lengths[0] == 1:  # nothing was seen: the sample is answered plainly
            torch.testing.assert_close(together[0, 0], generate(model, singles[0])[0][0, 0], atol=1e-4, rtol=1e-4)


def test_several_answers_to_one_prompt_share_its_draft() -> None:
    model, inputs = models.llava(), one_image("llava")
    torch.manual_seed(0)
    _, out, run = generate(model, inputs, METHOD, do_sample=True, num_return_sequences=3)
    one, _, _ = generate(model, inputs, METHOD)
    logits, _, _ = generate(model, inputs, METHOD, do_sample=True, num_return_sequences=3)
    assert out.sequences.shape[0] == 3
    torch.testing.assert_close(logits[0], one[0].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert run.new_tokens == 5  # the answer's steps, not the draft's


def test_pruned_layers_keep_their_tokens_apart() -> None:
    """FastV leaves other keys in deeper layers: evidence stays with its token."""
    model, inputs = models.llava(), one_image("llava")
    both, _, run = generate(model, inputs, METHOD, FastV(keep=6, layer=2))
    alone, _, _ = generate(model, inputs, FastV(keep=6, layer=2))
    assert run.visual_tokens_kept == [6]
    assert (both - alone).abs().max() > 1e-3
    maps = torch.stack([torch.stack(run.memory[0]["maps"][layer]) for layer in range(5)])[:, :, 0]
    dropped = [token for token in range(models.PATCHES) if token not in run.stages[-1].index[0]]
    assert (maps[0].sum(0) > 0).all()
    assert (maps[3][:, dropped] == 0).all()


def test_what_cannot_have_a_draft_is_refused() -> None:
    model, inputs = models.llava(), one_image("llava")
    with attach(model, METHOD), torch.no_grad():
        with pytest.raises(UsageError, match="reads a draft of the answer first"):
            model(**inputs)
        with pytest.raises(UsageError, match="past_key_values"):
            model.generate(**inputs, past_key_values=object(), max_new_tokens=2)
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    for options in ({"alpha": -1.0}, {"beta": math.inf}, {"draft_tokens": 1}):
        with pytest.raises(UsageError, match=next(iter(options))), attach(model, ILVAD(**options)):
            pass


def test_asking_the_embedded_model() -> None:
    lmm, scene = load_lmm(), next(iter(generate_scenes(1, 4711))).image
    with lmm.using(ILVAD(alpha=2.0)):
        answer = lmm.ask(scene, "Is there a circle?", max_new_tokens=4)
    assert answer
    assert lmm.last_run is not None
    assert lmm.last_run.memory[0]["draft_tokens"].shape == (1,)
