"""AIR's chain of edits."""

from __future__ import annotations

import models
import pytest
import torch
from eager import Prompt, check_against_eager
from hypothesis import given
from hypothesis import strategies as st

from vislm import attach
from vislm.errors import UsageError
from vislm.heads.air import AIR, project
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.attention_sums import logit_squares

HEADS = ((0, 1), (2, 3), (4, 0))
MIDDLE, SCALED = (1, 2, 3), (2,)


def chain(logits, mask, layer, row, gain=None):
    """The edits of one row as the paper lists them, for one sample."""
    s = logits[0, :, row].clone()
    if gain is not None and layer in MIDDLE:
        s = s * gain[:, None]
    if layer in SCALED and row >= Prompt.end:
        s[:, Prompt.start : Prompt.end] *= 1.5
        s[:, : Prompt.start] *= 0.7
    if layer in MIDDLE and row >= Prompt.length - 1:
        s[:, Prompt.start : Prompt.end] += 0.4 * s[:, Prompt.start : Prompt.end].abs().mean(0)
    weights = (s + mask[0, 0, row]).softmax(-1)
    for listed, head in HEADS:
        if listed == layer and row >= Prompt.length - 1 and weights[head, Prompt.end :].sum() >= 0.2:
            weights[head, Prompt.end :] = 0.0
    return weights


OPTIONS = {
    "heads": HEADS,
    "enhance": 1.5,
    "suppress": 0.7,
    "lift": 0.4,
    "threshold": 0.2,
    "beta": 0.2,
    "layers": MIDDLE,
    "scaled_layers": SCALED,
}


def test_session_equals_explicit_matrices() -> None:
    def edit(logits, mask, layer):
        rows = [chain(logits, mask, layer, row) for row in range(logits.shape[2])]
        for row in range(Prompt.length, len(rows)):  # decode steps move towards the mean of the keys so far
            if layer in MIDDLE:
                seen = rows[row][:, : row + 1]
                rows[row][:, : row + 1] = 0.8 * seen + 0.2 * seen.mean(-1, keepdim=True)
        return torch.stack(rows, 1)[None]

    check_against_eager(AIR(**OPTIONS), edit)


def test_the_released_prefill_equals_explicit_matrices() -> None:
    """With the heads' norms equalised and the prefill's matrices projected, so that rows see later tokens."""

    def gains(logits):
        squares = logits.square().sum((-2, -1))
        return (squares.mean() / squares).sqrt().clamp(0.8, 1.25)

    def edit(logits, mask, layer):
        p = Prompt.length
        first = gains(logits[0, :, :p, :p])
        rows = [chain(logits, mask, layer, row, first) for row in range(p)]
        if layer in MIDDLE:
            square = project(torch.stack(rows, 1)[None, :, :, :p], beta=0.2)[0]
            rows = [torch.nn.functional.pad(square[:, row], (0, logits.shape[3] - p)) for row in range(p)]
        for row in range(p, logits.shape[2]):
            weights = chain(logits, mask, layer, row, gains(logits[0, :, row : row + 1, : row + 1]))
            if layer in MIDDLE:
                seen = weights[:, : row + 1]
                weights[:, : row + 1] = 0.8 * seen + 0.2 * seen.mean(-1, keepdim=True)
            rows.append(weights)
        return torch.stack(rows, 1)[None]

    check_against_eager(AIR(**OPTIONS, project_prefill=True, rescale_logits=True), edit)


def test_layers_are_edited_once() -> None:
    with attach(models.llava(layers=32), AIR(heads=((16, 1), (3, 2), (10, 0)))) as session:
        stages = [(stage.layers, stage.rows) for _, stage in session.plan.edits]
    assert stages == [
        (frozenset(range(5, 18)) - frozenset(range(9, 15)), "last"),
        (frozenset(range(9, 15)), "after_image"),
        (frozenset({3}), "last"),
    ]


@given(
    heads=st.sampled_from([(2, 2), (4, 2)]), tokens=st.integers(1, 6), pad=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_the_norm_of_logits_comes_from_small_matrices(heads, tokens: int, pad: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads[0], pad + tokens, 4, generator=generator)
    key, value = (torch.randn(1, heads[1], pad + tokens + 2, 4, generator=generator) for _ in range(2))
    call = AttentionCall(query, key, value, None, True, 0.3)
    valid = (torch.arange(pad + tokens) >= pad)[None]
    logits = call.logits(torch.arange(pad, pad + tokens))[..., pad : pad + tokens]
    torch.testing.assert_close(logit_squares(call, valid), logits.square().sum((-2, -1)))


@pytest.mark.parametrize("options", [{"heads": None}, {"lift": -1.0}, {"beta": 2.0}, {"enhance": float("inf")}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))), attach(models.llava(), AIR(**{"heads": (), **options})):
        pass
