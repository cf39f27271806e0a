"""Methods that edit many rows hold a few of them at a time, never a matrix."""

from __future__ import annotations

import models
import pytest
import torch
from running import generate, one_image
from torch.utils._python_dispatch import TorchDispatchMode

from vislm.heads.act import ACT
from vislm.heads.imbalanced import Imbalanced
from vislm.heads.var import VAR
from vislm.lmm import edits


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize(
    "method",
    [
        VAR(dims=(3, 7, 20), tau=1.6, summ=0.0, rho=1.0),
        ACT(heads=((0, 0), (1, 3), (2, 0), (2, 1)), beta=0.2, threshold=0.01),
        Imbalanced(),
    ],
    ids=lambda method: method.name,
)
def test_rows_come_in_pieces(method, monkeypatch) -> None:
    model, inputs = models.llava(), one_image("llava", words=tuple(7 + i % 40 for i in range(450)))
    untouched, _, _ = generate(model, inputs, max_new_tokens=2)
    whole, _, _ = generate(model, inputs, method, max_new_tokens=2)
    assert (whole - untouched).abs().max() > 1e-3
    monkeypatch.setattr(edits, "PIECE", 2**14)
    with Largest() as largest:
        piecewise, _, _ = generate(model, inputs, method, max_new_tokens=2)
    assert largest.numel < inputs["input_ids"].shape[1] ** 2 / 2
    torch.testing.assert_close(piecewise, whole, atol=2e-5, rtol=1e-5)
