"""The fast AUROC equals the plain one, and a weighted one that of the rows drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.eval.auroc import Auroc
from vislm.eval.questions.yes_no import auroc

rows = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30)


def columns(found) -> np.ndarray:
    return np.asarray([[float(truth), float(margin)] for truth, margin in found])


@given(rows)
def test_equals_the_plain_one(found) -> None:
    plain = auroc([truth for truth, _ in found], [float(margin) for _, margin in found])
    assert Auroc()(columns(found)) == pytest.approx(plain, abs=1e-12)


@given(rows, st.integers(0, 1000))
def test_weights_are_repeated_rows(found, seed) -> None:
    x = columns(found)
    index = np.random.default_rng(seed).integers(0, len(x), len(x))
    counts = np.bincount(index, minlength=len(x)).astype(float)
    assert Auroc().weighted(x)(counts) == pytest.approx(Auroc()(x[index]), abs=1e-12)
