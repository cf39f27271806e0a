"""Staged pruning: two methods under one budget."""

from __future__ import annotations

import models
import pytest
import torch
from running import generate, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.token_pruning.cdpruner import CDPruner
from vislm.token_pruning.divprune import DivPrune
from vislm.token_pruning.staged import Staged


@pytest.mark.parametrize("selection", [DivPrune(), CDPruner(relevance="embedding")])
def test_the_tower_overshoots_and_the_selection_meets_the_budget(selection) -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, Staged(keep=4, tower=FlowCut(), selection=selection, overshoot=2.5))
    assert run.tower_tokens[-1] == 10
    assert run.visual_tokens_kept == [4]


def test_a_ratio_is_of_the_whole_image() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, Staged(keep=0.25, tower=FlowCut(), selection=DivPrune(), overshoot=2.0))
    assert run.tower_tokens[-1] == 8
    assert run.visual_tokens_kept == [4]


def test_without_calibration_it_is_the_two_methods_side_by_side() -> None:
    model, inputs = models.llava(), one_image("llava")
    method = Staged(keep=4, tower=FlowCut(), selection=DivPrune(), calibrate=False)
    staged, _, _ = generate(model, inputs, method)
    by_hand, _, _ = generate(
        model, inputs, FlowCut(keep=8, positions="original"), DivPrune(keep=4, positions="original")
    )
    assert torch.equal(staged, by_hand)


def test_one_method_alone_has_the_whole_budget() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, Staged(keep=5, tower=FlowCut()))
    assert run.visual_tokens_kept == run.tower_tokens[-1:] == [5]
    _, _, run = generate(model, inputs, Staged(keep=0.25, selection=DivPrune()))
    assert run.visual_tokens_kept == [4]


def test_keeping_all_changes_nothing() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs)
    staged, _, _ = generate(model, inputs, Staged(keep=1.0, tower=FlowCut(), selection=DivPrune()))
    assert torch.equal(plain, staged)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (Staged(), UsageError, "needs a tower method, a selection, or both"),
        (Staged(tower=FlowCut(), overshoot=0.5), UsageError, "overshoot=0.5"),
        (Staged(keep=4, tower=DivPrune()), PlanConflict, "divprune does not act only inside the vision tower"),
        (Staged(keep=4, selection=FastV()), PlanConflict, "fastv does not act only before the language model"),
    ],
)
def test_what_cannot_work_is_refused(method, error, message: str) -> None:
    with pytest.raises(error, match=message), attach(models.llava(), method):
        pass
