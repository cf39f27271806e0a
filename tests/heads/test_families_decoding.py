"""Every head method under every way to decode: each answer has the logits, or the score, of the explicit matrices."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, TILE
from family_cases import CASES, Case, ilvad, vcd
from family_eager import Sample, check, sample
from running import generate

from vislm import attach
from vislm.errors import UsageError

STEPS = 5
NO_IMAGES = list(range(TILE, 64))
"""Placeholders and markers, which would be images in a run without a cache."""
every_method = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reference is not None])
FAST = ("llava", "qwen2_5_vl")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in FAMILIES]
)


def expected(own: Sample, case: Case, answer: torch.Tensor) -> torch.Tensor:
    assert case.reference is not None
    return case.reference(own, answer[:-1])


@every_family
@every_method
def test_a_static_cache(family: str, name: str) -> None:
    own, case = sample(family, 1), CASES[name]
    options = {"cache_implementation": "static", "max_new_tokens": STEPS}
    logits, out, _ = generate(own.model, own.inputs, case.method, **options)
    check(logits[:, 0], expected(own, case, out.sequences[0, own.length :]), name)


@every_family
@every_method
def test_sampling(family: str, name: str) -> None:
    """Nothing is silently off when tokens are drawn; three answers to one prompt."""
    own, case = sample(family, 1), CASES[name]
    torch.manual_seed(1)
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    options |= {"max_new_tokens": STEPS, "suppress_tokens": NO_IMAGES}
    logits, out, _ = generate(own.model, own.inputs, case.method, **options)
    answers = out.sequences[:, own.length :]
    assert len(answers.unique(dim=0)) > 1 or bool((logits.isfinite().sum(-1) == 1).any()), "nothing was drawn"
    for row, answer in enumerate(answers):
        check(logits[:, row], expected(own, case, answer), name)


TOKEN_BY_TOKEN = {"ilvad"}


@every_method
def test_assisted_decoding(name: str) -> None:
    """Candidates are read several at a time; each of their rows is edited."""
    own, case = sample("llava", 1), CASES[name]
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8}
    if name in TOKEN_BY_TOKEN:
        with pytest.raises(UsageError, match=f"{name} goes token by token"):
            generate(own.model, own.inputs, case.method, **options)
        return
    plain, _, _ = generate(own.model, own.inputs, case.method, max_new_tokens=8)
    logits, out, _ = generate(own.model, own.inputs, case.method, **options)
    check(logits[:, 0], expected(own, case, out.sequences[0, own.length :]), name)
    assert torch.equal(plain.argmax(-1), logits.argmax(-1))
    for method, reference in case.variants.values():
        logits, out, _ = generate(own.model, own.inputs, method, **options)
        check(logits[:, 0], reference(own, out.sequences[0, own.length : -1]), name)


@every_family
@every_method
def test_beams(family: str, name: str) -> None:
    """The scores are those of the answers, so that what a method knows of a beam is that beam's, also reordered."""
    own, case = sample(family, 1), CASES[name]
    options = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True}
    options |= {"max_new_tokens": STEPS, "suppress_tokens": NO_IMAGES}
    _, out, _ = generate(own.model, own.inputs, case.method, **options)
    for answer, score in zip(out.sequences[:, own.length :], out.sequences_scores, strict=True):
        if score < -1e6:  # a beam that stands for nothing, as fewer words are admitted than there are beams
            continue
        log_probability = expected(own, case, answer).log_softmax(-1).gather(1, answer[:, None]).sum()
        torch.testing.assert_close(score * STEPS, log_probability, atol=2e-4, rtol=1e-5)


def test_beams_of_two_methods_that_both_follow_them() -> None:
    """A score of every token, and a contrast stream with a cache of its own."""
    own = sample("llava", 1)
    methods = CASES["ilvad"].method, CASES["vcd"].method
    options = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True}
    options |= {"max_new_tokens": STEPS, "suppress_tokens": NO_IMAGES}
    _, out, _ = generate(own.model, own.inputs, methods[1], max_new_tokens=5, suppress_tokens=NO_IMAGES)
    draft = out.sequences[0, own.length :]
    for order in (methods, methods[::-1]):
        _, out, _ = generate(own.model, own.inputs, *order, **options)
        for answer, score in zip(out.sequences[:, own.length :], out.sequences_scores, strict=True):
            logits = vcd(own, answer[:-1], ilvad(own, answer[:-1], draft))
            log_probability = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
            torch.testing.assert_close(score * STEPS, log_probability, atol=2e-4, rtol=1e-5)


def test_what_opera_cannot_do_is_refused_with_a_way_out() -> None:
    own, method = sample("llava"), CASES["opera"].method
    twice = {name: torch.cat([value, value]) for name, value in own.inputs.items()}
    with attach(own.model, method):
        for inputs, options, message in (
            (twice, {}, "opera searches one sample at a time: call generate with a batch of 1, or lmm.ask"),
            (own.inputs, {"do_sample": True}, "opera does not sample; use do_sample=False"),
            (own.inputs, {"cache_implementation": "static"}, "opera needs a dynamic cache"),
        ):
            with pytest.raises(UsageError, match=message):
                own.model.generate(**inputs, max_new_tokens=2, **options)
