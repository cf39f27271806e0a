"""Curves of knockout by layer for an LMM: what the answer loses when an edge is cut around each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.knockout import Knockout, layers_at, relative_change
from vislm.analysis.lmm_importance import next_token
from vislm.lmm.model import LMM, ImageSource

EDGES = ("image>question", "image>last", "question>last", "before>last")
"""Flows of a question about one image; with several add "earlier_frames>image"."""

Mode = Literal["window", "inverse", "top_down", "bottom_up"]


def knockout_curves(
    lmm: LMM,
    images: Sequence[ImageSource],
    question: str,
    edges: Sequence[str] = EDGES,
    width: int = 1,
    *,
    mode: Mode = "window",
    token: int | None = None,
) -> Tensor:
    """Return (E, L): change in percent of the probability of the answer's first token, mean over images.

    Args:
        lmm: the model.
        images: each asked about alone; only those answered rightly should be given.
        question: plain text.
        edges: "source>target", see :mod:`vislm.analysis.knockout`.
        width: layers of a window.
        mode: which layers belong to a point of the curve.
        token: id of the token asked about, such as the true answer's; None: what the whole model says.
    """
    depth = len(lmm.adapter.layers)
    total = torch.zeros(len(edges), depth, dtype=torch.float64)
    for image in images:
        inputs = lmm.prepare([image], [question])
        with torch.no_grad():
            base = _probabilities(lmm, inputs)
            own = int(base.argmax()) if token is None else token
            for row, edge in enumerate(edges):
                for layer in range(depth):
                    cut = Knockout((edge,), tuple(layers_at(layer, width, depth, mode)))
                    new = _probabilities(lmm, inputs, cut)
                    total[row, layer] += float(relative_change(new[own], base[own]))
    return (total / len(images)).float()


def _probabilities(lmm: LMM, inputs: dict[str, Tensor], *interventions: Knockout) -> Tensor:
    logits = next_token(lmm.model, inputs, *interventions).logits
    assert logits is not None
    return logits[0].double().softmax(-1)
