"""Every head method on a tiny model of every family, against its equations on explicit matrices.

The prefill and eight decode steps, one image. Methods come from the registry: a new one fails until it has a case in
``family_cases``.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from family_cases import CASES, NO_STAGES
from family_eager import STEPS, Sample, check, plain, sample
from running import generate
from test_opera import BruteForce
from torch import Tensor

from vislm import registry
from vislm.support import reference_adapter, supported

every_family = pytest.mark.parametrize("family", FAMILIES)
BY_EQUATIONS = [
    pytest.param(method, reference, id=f"{name}{label and f', {label}'}")
    for name, case in CASES.items()
    if case.reference is not None
    for label, (method, reference) in {"": (case.method, case.reference), **case.variants}.items()
]


def test_every_method_has_a_case_and_every_family_a_model() -> None:
    assert sorted([*CASES, *NO_STAGES]) == registry.names("heads")
    assert all(case.method.name == name and case.neutral for name, case in CASES.items())
    assert {name for name, case in CASES.items() if case.reference is None} == {"opera"}
    for name in CASES:
        for family in FAMILIES:
            assert supported("heads", name, reference_adapter(family)).works, (name, family)


@every_family
def test_the_reference_is_the_model(family: str) -> None:
    """By transformers' own eager attention; otherwise the comparisons below would mean nothing."""
    own = sample(family)
    answer = own.greedy(STEPS)
    logits = own.logits(answer)
    own.model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        expected = own.model(**own.behind(answer)).logits[0, own.length - 1 :]
    own.model.set_attn_implementation({"text_config": "sdpa"})
    check(logits, expected, family)
    check(generate(own.model, own.inputs, max_new_tokens=STEPS + 1)[0][:, 0], own.logits(answer, plain), family)


@every_family
@pytest.mark.parametrize(("method", "reference"), BY_EQUATIONS)
def test_session_equals_explicit_matrices(family: str, method, reference) -> None:
    own = sample(family)
    logits, out, _ = generate(own.model, own.inputs, method, max_new_tokens=STEPS + 1)
    answer = out.sequences[0, own.length :]
    check(logits[:, 0], reference(own, answer[:-1]), f"{method.name} on {family}")
    untouched = own.logits(answer[:-1])
    assert (logits[:, 0] - untouched).abs().max() > 1e-3, "the settings do nothing"


class WholeSequences(BruteForce):
    """OPERA's search by brute force, on any family."""

    def __init__(self, own: Sample, method) -> None:
        self.own, self.method = own, method
        self.prompt = own.inputs["input_ids"][0].tolist()
        self.image = torch.tensor([column in own.image for column in range(own.length)])
        self.went_back: list[int] = []
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def read(self, answer: list[int]) -> tuple[Tensor, Tensor]:
        if tuple(answer) not in self.known:
            seen: list[Tensor] = []

            def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
                seen.append(plain(logits, mask))
                return seen[-1]

            logits = self.own.logits(torch.tensor(answer, dtype=torch.long), edit)
            attention = seen[-1][0].amax(0)
            self.known[tuple(answer)] = logits[-1], attention / attention.sum(-1, keepdim=True)
        return self.known[tuple(answer)]


@every_family
def test_opera_searches_like_brute_force(family: str) -> None:
    own, method = sample(family, 1), CASES["opera"].method
    logits, out, _ = generate(own.model, own.inputs, method, max_new_tokens=STEPS + 1)
    answer = out.sequences[0, own.length :].tolist()
    brute = WholeSequences(own, method)
    assert answer == brute.search(STEPS + 1)
    for step in range(STEPS + 1):  # the rows are the beams; the best answer's beginning is one of them
        expected = brute.read(answer[:step])[0]
        rows = (logits[step] - expected).abs().amax(-1) / expected.abs().max()
        assert rows.min() <= 1e-5, step
