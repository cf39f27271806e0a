"""OPERA's equations, and its search against a brute-force one with whole attention matrices and no cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import families
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from running import GENERATE, KeepGiven, generate, hook_count, one_image
from torch import Tensor

from vislm import FastV, FlowCut, attach, load_lmm, registry
from vislm.errors import UsageError
from vislm.heads.opera import OPERA, longer_columns, normalised_row, over_trust, summary_place
from vislm.heads.vcd import VCD
from vislm.lmm.interventions import EditStage
from vislm.token_pruning.divprune import DivPrune


@given(seed=st.integers(0, 30), length=st.integers(1, 12), window=st.integers(1, 12))
def test_columns_grow_row_by_row(seed: int, length: int, window: int) -> None:
    triangle = torch.rand(2, length, length, generator=torch.Generator().manual_seed(seed)).tril()
    columns = None
    for number in range(length):
        columns = longer_columns(columns, triangle[:, number, : number + 1], 50.0, window)
    assert columns is not None
    for row in range(2):
        for j in range(length):
            expected = math.prod(50.0 * triangle[row, i, j].item() for i in range(j, length))
            if j < length - window:
                expected = 0.0
            assert columns[row, j].exp().item() == pytest.approx(expected, rel=1e-3)
    assert over_trust(columns)[0].item() == pytest.approx(1e-7 * columns[0].exp().max().item(), rel=1e-4)


def test_penalties_stay_finite() -> None:
    assert over_trust(torch.tensor([[500.0, 2000.0]])).item() == pytest.approx(1e30, rel=1e-3)
    columns = longer_columns(None, torch.zeros(1, 1), 50.0, 512)
    assert over_trust(columns).item() == 0.0


def test_rows_are_the_maximum_over_heads_and_sum_to_one() -> None:
    weights = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]])
    torch.testing.assert_close(normalised_row(weights), torch.tensor([[0.5, 0.5, 0.6]]) / 1.6)


def test_the_place_that_all_beams_lean_on() -> None:
    assert summary_place(torch.tensor([[1, 1, 3, 1], [1, 2, 1, 0]])) == (1, 2)
    assert summary_place(torch.tensor([[1, 1], [2, 2]])) is None


class BruteForce:
    """Every beam is a list of tokens; each forward runs whole sequences with eager attention."""

    def __init__(self, model, inputs: dict, method: OPERA) -> None:
        self.model, self.inputs, self.method = copy.deepcopy(model), inputs, method
        self.model.set_attn_implementation({"text_config": "eager"})
        self.prompt = inputs["input_ids"][0].tolist()
        self.image = torch.tensor([t == models.IMAGE_TOKEN for t in self.prompt])
        self.went_back: list[int] = []
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def read(self, answer: list[int]) -> tuple[Tensor, Tensor]:
        """Next-token logits (V,), and the last layer's map (T, T): maximum over heads, rows normalised."""
        if tuple(answer) not in self.known:
            with torch.no_grad():
                out = self.model(
                    input_ids=torch.tensor([self.prompt + answer]),
                    pixel_values=self.inputs["pixel_values"],
                    output_attentions=True,
                    use_cache=False,
                )
            attention = out.attentions[-1][0].amax(0)
            self.known[tuple(answer)] = out.logits[0, -1], attention / attention.sum(-1, keepdim=True)
        return self.known[tuple(answer)]

    def products(self, attention: Tensor, length: int) -> list[float]:
        """Column products of the answer's first ``length`` rows, from one map (T, T)."""
        start = len(self.prompt)
        return [
            math.prod(self.method.scale_factor * attention[start + i, start + j].item() for i in range(j, length))
            if j >= length - self.method.window_size
            else 0.0
            for j in range(length)
        ]

    def penalty(self, answer: list[int]) -> float:
        _, attention = self.read(answer)
        if len(answer) <= self.method.image_steps:
            return -attention[-1, : len(self.prompt)][self.image].sum().item()
        return 1e-7 * max(self.products(attention, len(answer)))

    def places(self, answer: list[int]) -> list[int]:
        _, attention = self.read(answer)
        found = []
        for length in range(1, len(answer) + 1):
            products = self.products(attention, length)
            found.append(products.index(max(products)))
        return found[-self.method.window_size :]

    def judged(self, answer: list[int], banned: set[int]) -> Tensor:
        logits = self.read(answer)[0]
        candidates = logits.topk(self.method.candidates).indices.tolist()
        new = torch.full_like(logits, -torch.inf) if self.method.choose_from == "candidates" else logits.clone()
        for token in candidates:
            new[token] = logits[token] - self.method.penalty_weight * self.penalty([*answer, token])
        blocked = new.clone()
        blocked[list(banned)] = -torch.inf
        return (new if bool(blocked.isneginf().all()) else blocked).log_softmax(-1)

    def search(self, steps: int) -> list[int]:
        rows = self.method.num_beams
        history: list[list[tuple[list[int], float]]] = [[([], 0.0 if n == 0 else -1e9) for n in range(rows)]]
        banned: dict[int, list[set[int]]] = {}
        visits: dict[int, int] = {}
        furthest = 0
        while True:
            beams, step = history[-1], len(history) - 1
            bans = banned.setdefault(step, [set() for _ in beams])
            options = []
            for parent, (answer, score) in enumerate(beams):
                scores = self.judged(answer, bans[parent])
                options += [(score + s, parent, token) for token, s in enumerate(scores.tolist())]
            options.sort(key=lambda option: -option[0])
            if step + 1 == steps:
                _, parent, token = options[0]
                return [*beams[parent][0], token]
            chosen = options[:rows]
            for _, parent, token in chosen:
                bans[parent].add(token)
            history.append([([*beams[parent][0], token], score) for score, parent, token in chosen])
            banned.pop(step + 1, None)
            keep = self.back([answer for answer, _ in history[-1]], visits, furthest)
            if keep is not None:
                furthest = max(furthest, keep[0])
                if keep[1] is not None:
                    self.went_back.append(keep[1])
                    del history[keep[1] + 1 :]

    def back(self, answers: list[list[int]], visits: dict[int, int], furthest: int) -> tuple[int, int | None] | None:
        """(place, how many tokens stay); None if the beams do not lean on one place often enough."""
        if self.method.threshold is None:
            return None
        modes = []
        for answer in answers:
            places = self.places(answer)
            count, place = max((places.count(p), -p) for p in set(places))
            modes.append((-place, count))
        place = modes[0][0]
        if any(p != place for p, _ in modes) or min(c for _, c in modes) <= self.method.threshold or place < furthest:
            return None
        raw = place
        while visits.get(place, 0) >= self.method.retries:
            place -= 1
        if place < self.method.image_steps or place + 1 >= len(answers[0]):
            return raw, None
        visits[place] = visits.get(place, 0) + 1
        return raw, place + 1


def tiny(seed: int = 0):
    """A model that never writes the image placeholder, which a run without a cache would take for an image."""
    model = models.llava(seed=seed)
    with torch.no_grad():
        model.lm_head.weight[models.IMAGE_TOKEN] = 0.0
    return model


SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "image": (0, 6, {"num_beams": 3, "penalty_weight": 40.0, "threshold": None}),
    "over-trust": (1, 8, {"num_beams": 3, "penalty_weight": 1e5, "threshold": None, "image_steps": 2}),
    "paper": (0, 7, {"num_beams": 3, "penalty_weight": 1e5, "image_steps": 2, "choose_from": "candidates"}),
    "window": (0, 8, {"num_beams": 2, "penalty_weight": 1e5, "threshold": None, "image_steps": 1, "window_size": 3}),
    "efficient": (0, 8, {"num_beams": 3, "penalty_weight": 1e5, "candidates": 1, "image_steps": 1}),
}
BACK: dict[str, tuple[int, dict[str, Any]]] = {
    "two places": (0, {"num_beams": 3, "image_steps": 1, "scale_factor": 50.0}),
    "to the start": (1, {"num_beams": 3, "image_steps": 0, "scale_factor": 50.0}),
    "three places": (2, {"num_beams": 2, "image_steps": 0, "scale_factor": 20.0}),
    "paper": (4, {"num_beams": 2, "image_steps": 1, "scale_factor": 50.0, "choose_from": "candidates"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_search_equals_brute_force(setting: str) -> None:
    seed, steps, options = SETTINGS[setting]
    model, inputs, method = tiny(seed), one_image("llava", seed), OPERA(**options)
    _, out, run = generate(model, inputs, method, max_new_tokens=steps)
    plain = model.generate(**inputs, **{**GENERATE, "max_new_tokens": steps}, num_beams=method.num_beams)
    assert out.sequences[0, -steps:].tolist() == BruteForce(model, inputs, method).search(steps)
    assert not torch.equal(out.sequences, plain.sequences)
    assert run.new_tokens == steps - 1
    assert run.kv_bytes == run.kv_bytes_expected
    assert len(out.logits) == steps


@pytest.mark.parametrize("setting", BACK)
def test_going_back_equals_brute_force(setting: str) -> None:
    seed, options = BACK[setting]
    model, inputs = tiny(seed), one_image("llava", seed)
    method = OPERA(**options, candidates=2, threshold=2, retries=2, penalty_weight=1e5)
    _, out, run = generate(model, inputs, method, max_new_tokens=12)
    brute = BruteForce(model, inputs, method)
    assert out.sequences[0, -12:].tolist() == brute.search(12)
    assert sorted(brute.went_back) == sorted(n + 1 for n, c in run.memory[0]["went_back"].items() for _ in range(c))
    assert brute.went_back


LOOKING = OPERA(penalty_weight=1e-12, threshold=10**6, scale_factor=1.0, num_beams=3)
"""Looks ahead at every step and never changes a choice."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "eos_token_id": list(range(20, 32))},
        {"num_beams": 3, "eos_token_id": list(range(20, 32)), "early_stopping": True, "num_return_sequences": 3},
        {"num_beams": 3, "eos_token_id": list(range(20, 26)), "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 3, "eos_token_id": list(range(20, 26)), "length_penalty": -1.0, "repetition_penalty": 1.5},
        {"num_beams": 1},
    ],
)
def test_without_effect_it_is_the_beam_search_of_transformers(options: dict) -> None:
    for seed in range(2):
        model, inputs = models.llava(seed=seed), one_image("llava", seed)
        call = {**GENERATE, "max_new_tokens": 10, "num_beams": 3, "pad_token_id": 2, **options}
        expected = model.generate(**inputs, **call, output_scores=call["num_beams"] > 1)
        with attach(model, LOOKING):
            out = model.generate(**inputs, **call)
        assert torch.equal(out.sequences, expected.sequences)
        if call["num_beams"] > 1:
            torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture
    inputs = families.inputs(family, ([picture(0, 0)], [7, 8, 9]))
    expected = model.generate(**inputs, **GENERATE, num_beams=3)
    with attach(model, LOOKING):
        out = model.generate(**inputs, **GENERATE)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize(
    "others",
    [
        (FlowCut(keep=5, tower_keep=6),),
        (DivPrune(keep=5),),
        (FastV(keep=5),),
        (VCD(),),
        (KeepGiven((1, 2), "contiguous"),),
    ],
    ids=["flowcut", "divprune", "fastv", "vcd", "contiguous"],
)
def test_under_other_methods(others: tuple) -> None:
    model, inputs = models.llava(), one_image("llava")
    _, expected, _ = generate(model, inputs, *others, num_beams=3)
    _, out, _ = generate(model, inputs, *others, LOOKING)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("others", [(), (FastV(keep=5),), (VCD(beta=0.0), FlowCut(keep=5, tower_keep=6))])
def test_going_back_finds_the_same_logits_again(others: tuple, monkeypatch) -> None:
    """After tokens were taken back and read again, by model and contrast stream, everything is as it was."""
    seen, backs = [], []

    def judge(self, view):
        if view.tokens.shape[1] == 2:
            seen.append(view)
        return view.logits

    def go_back(self, view):
        if view.tokens.shape[1] == 5 and len(backs) < 2:
            backs.append(5)
            return 2
        return None

    monkeypatch.setattr(OPERA, "_judge", judge)
    monkeypatch.setattr(OPERA, "_go_back", go_back)
    _, out, run = generate(models.llava(), one_image("llava"), *others, OPERA(num_beams=3), max_new_tokens=7)
    assert len(seen) == 3
    for view in seen[1:]:
        assert torch.equal(view.tokens, seen[0].tokens)
        torch.testing.assert_close(view.logits, seen[0].logits, atol=2e-5, rtol=1e-5)
    assert len(out.logits) == 7
    assert run.new_tokens == 6


def test_both_effects_off_is_bit_identical() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs)
    same, _, _ = generate(model, inputs, OPERA(penalty_weight=0.0, threshold=None))
    assert torch.equal(plain, same)


def test_asking_takes_one_sample_at_a_time() -> None:
    lmm = load_lmm()
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    questions = ["Is there a dog?", "What is in the picture?"]
    with lmm.using(OPERA(num_beams=2, image_steps=2)):
        together = lmm.ask_many(images, questions, max_new_tokens=8, candidates=("yes", "no"))
        alone = [lmm.ask(image, text, max_new_tokens=8) for image, text in zip(images, questions, strict=True)]
    assert [answer.text for answer in together] == alone
    assert set(together[0].candidates) == {"yes", "no"}


def test_samples_without_an_image() -> None:
    model = models.llava()
    with attach(model, OPERA(num_beams=2)):
        out = model.generate(input_ids=torch.tensor([[1, 5, 6, 9]]), **GENERATE)
    assert out.sequences.shape == (1, 10)


def test_bfloat16_has_no_nan() -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    logits, out, _ = generate(model, inputs, OPERA(num_beams=2, image_steps=2), max_new_tokens=8)
    assert not logits.isnan().any()
    assert math.isfinite(out.sequences_scores.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"cache_implementation": "static"}, "dynamic cache"),
        ({"use_cache": False}, "use_cache"),
        ({"output_scores": True}, "output_scores"),
        ({"custom_generate": print}, "strategy"),
    ],
)
def test_what_the_search_cannot_do(options: dict, message: str) -> None:
    model, inputs = models.llava(), one_image("llava")
    model(**inputs)  # transformers adds hooks of its own
    before = hook_count(model)
    with pytest.raises(UsageError, match=message), attach(model, OPERA()):
        model.generate(**inputs, **{**GENERATE, **options})
    assert "generate" not in model.__dict__
    assert hook_count(model) == before


def test_a_batch_is_refused_by_generate() -> None:
    model = models.llava()
    ids = torch.cat([models.prompt(7, 8), models.prompt(8, 7)])
    with pytest.raises(UsageError, match="one sample at a time"), attach(model, OPERA()):
        model.generate(input_ids=ids, pixel_values=models.pixels(2), **GENERATE)


class Last:
    """Lets the last layer look at the first token alone."""

    name = "last"

    def plan(self, adapter) -> list[EditStage]:
        def first(view):
            return torch.zeros_like(view.logits).index_fill(-1, torch.tensor([0]), 1.0)

        return [EditStage(frozenset({len(adapter.layers) - 1}), first)]


def test_it_judges_by_the_attention_that_other_methods_leave() -> None:
    """Where nothing looks at the image, every candidate has the same penalty."""
    model, inputs = tiny(0), one_image("llava", 0)
    method = OPERA(num_beams=3, penalty_weight=1e4, threshold=None, image_steps=100)
    _, alone, _ = generate(model, inputs, method)
    _, plain, _ = generate(model, inputs, num_beams=3)
    assert not torch.equal(alone.sequences, plain.sequences)
    for methods in ((method, Last()), (Last(), method)):
        _, both, _ = generate(model, inputs, *methods)
        _, edited, _ = generate(model, inputs, Last(), num_beams=3)
        assert torch.equal(both.sequences, edited.sequences)


def test_conflicts_and_impossible_options() -> None:
    model = models.llava()
    wrong = {"candidates": 0, "penalty_weight": -1.0, "threshold": 0, "window_size": 0, "retries": 0}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"{name}={value}"), attach(model, OPERA(**{name: value})):  # pyright: ignore[reportArgumentType]
            pass
    with pytest.raises(UsageError, match="one candidate"), attach(model, OPERA(candidates=1, choose_from="candidates")):
        pass


def test_options_by_name() -> None:
    efficient = registry.build("heads", "opera:candidates=1,threshold=25")
    assert efficient == OPERA(candidates=1, threshold=25)
    assert registry.build("heads", "opera:threshold=none,choose_from=candidates") == OPERA(
        threshold=None, choose_from="candidates"
    )
