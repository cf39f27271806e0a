"""The area under the ROC curve for thousands of resamples: margins are sorted once, resamples are weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Auroc:
    """A statistic of columns (n, 2), truth (1 positive, 0 negative) and margin; 0.5 without both kinds.

    It does what ``vislm.eval.questions.yes_no.auroc`` does, ties counting half.
    """

    def __call__(self, columns: Floats) -> float:
        """Return the AUROC of the rows as they are."""
        return self.weighted(columns)(np.ones(len(columns)))

    def weighted(self, columns: Floats) -> Callable[[Floats], float]:
        """Return a function from how often each row was drawn (n,) to the AUROC of that resample."""
        order = np.argsort(columns[:, 1], kind="stable")
        truth, margin = columns[order, 0] > 0.5, columns[order, 1]
        ties = np.flatnonzero(np.r_[True, margin[1:] != margin[:-1]]) if len(margin) else np.empty(0, np.int64)

        def score(weights: Floats) -> float:
            drawn = weights[order]
            positives, negatives = (np.add.reduceat(drawn * kind, ties) for kind in (truth, ~truth))
            pairs = positives.sum() * negatives.sum()
            if not pairs:
                return 0.5
            below = negatives.cumsum() - negatives / 2  # ties count half
            return float((positives * below).sum() / pairs)

        return score
