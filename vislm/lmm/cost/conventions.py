"""FLOP counts as other papers make them, to compare with their tables. Our own are in ``cost.py``.

"multiply-adds" (FastV, DivPrune): 4 n d^2 + 2 n^2 d + 2 n d m for each layer: a multiply-add counts once, and the gate
of the MLP is left out. "gated" (SparseVLM's code): 4 n d^2 + 2 n^2 d + 3 n d m. Both are usually given for the visual
tokens alone. FlowCut's figures are the exact count with 58-60 words of text, tower and projector included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vislm.lmm.cost.flops import DecoderShape

Convention = Literal["multiply-adds", "gated"]
_MLP_MATRICES: dict[Convention, int] = {"multiply-adds": 2, "gated": 3}


def published_flops(shape: DecoderShape, tokens: Sequence[int], convention: Convention) -> int:
    """Return the count of the decoder layers; ``tokens[l]`` columns enter layer l.

    Args:
        shape: of the decoder. The formulas know no grouped keys and values, and no logits.
        tokens: for each layer.
        convention: see the module.
    """
    d, mlp = shape.width, _MLP_MATRICES[convention] * shape.mlp_width
    return sum(4 * n * d**2 + 2 * n**2 * d + n * d * mlp for n in tokens)
