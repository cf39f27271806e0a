"""Many heads in one forward give what each gives alone."""

from __future__ import annotations

import models
import pytest
import torch
from running import generate

from vislm import attach
from vislm.calibration.row_heads import RowHeads, Silenced, calibrated, zero_tuned
from vislm.heads.act import ACT
from vislm.heads.zerotuning import ZeroTuning

ROWS = RowHeads(((1, 2), None, (3, 0), (3, 3)))


def inputs(rows: int = 1) -> dict[str, torch.Tensor]:
    return {
        "input_ids": models.prompt(7, 8, 9).expand(rows, -1),
        "pixel_values": models.pixels().expand(rows, -1, -1, -1),
    }


@pytest.mark.parametrize("kind", ["act", "zerotuning"])
def test_edited_heads(kind: str) -> None:
    model = models.llava()
    if kind == "act":
        together, alone = (
            calibrated(ROWS, 0.1, 0.05, "first_found"),
            lambda pair: ACT((pair,), beta=0.1, threshold=0.05),
        )
    else:
        together, alone = zero_tuned(ROWS, 4.0), lambda pair: ZeroTuning(heads=(pair,), gamma=4.0)
    with attach(model, together), torch.no_grad():
        logits = model(**inputs(4)).logits
    with torch.no_grad():
        plain = model(**inputs()).logits[0]
    for row, pair in enumerate(ROWS.heads):
        if pair is None:
            torch.testing.assert_close(logits[row], plain, atol=1e-4, rtol=1e-4)
            continue
        with attach(model, alone(pair)), torch.no_grad():
            torch.testing.assert_close(logits[row], model(**inputs()).logits[0], atol=1e-4, rtol=1e-4)
        assert (logits[row] - plain).abs().max() > 1e-3


def test_silenced_heads() -> None:
    model = models.llava()
    with attach(model, Silenced(ROWS)), torch.no_grad():
        logits = model(**inputs(4)).logits
    for row, pair in enumerate(ROWS.heads):
        handles = []
        if pair is not None:
            layer, head = pair

            def silence(module, args, head=head):
                return (args[0].unflatten(-1, (4, 8)).index_fill(2, torch.tensor([head]), 0.0).flatten(2),)

            projection = model.model.language_model.layers[layer].self_attn.o_proj
            handles.append(projection.register_forward_pre_hook(silence))
        with torch.no_grad():
            torch.testing.assert_close(logits[row], model(**inputs()).logits[0], atol=1e-4, rtol=1e-4)
        for handle in handles:
            handle.remove()


def test_no_heads_change_nothing() -> None:
    model = models.llava()
    plain, _, _ = generate(model, inputs())
    for method in (Silenced(RowHeads((None,))), zero_tuned(RowHeads((None,)), 2.0)):
        assert torch.equal(plain, generate(model, inputs(), method)[0])
