"""VAF's scaling of key groups."""

from __future__ import annotations

import models
import pytest
from eager import Prompt, check_against_eager

from vislm import attach
from vislm.errors import PlanConflict, UsageError
from vislm.heads.vaf import VAF


def test_session_equals_explicit_matrices() -> None:
    def edit(logits, mask, layer):
        changed = logits.clone()
        if layer in (1, 2):
            changed[:, :, Prompt.end :, Prompt.start : Prompt.end] *= 1.5
            changed[:, :, Prompt.end :, : Prompt.start] *= 0.6
        return (changed + mask).softmax(-1)

    check_against_eager(VAF(enh_para=1.5, sup_para=0.6, layers=(1, 2)), edit)


def test_published_layers() -> None:
    for depth, layers in ((32, range(9, 15)), (5, [1]), (40, range(11, 19))):
        with attach(models.llava(layers=depth), VAF()) as session:
            ((_, stage),) = session.plan.edits
        assert stage.layers == frozenset(layers)


def test_impossible_options() -> None:
    for options in ({"enh_para": -1.0}, {"sup_para": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(options))), attach(models.llava(), VAF(**options)):
            pass
    with pytest.raises(PlanConflict, match=r"vaf edits attention of decoder layers \[7\]; the model has layers 0..4"):
        with attach(models.llava(), VAF(layers=(7,))):
            pass
