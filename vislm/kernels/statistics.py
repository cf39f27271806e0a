"""What can be asked about an attention without ever forming its matrix, and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StatisticsRequest:
    """The statistics wanted from one attention call; what is not asked for is not computed.

    ``A`` is the attention ``(B, Hq, Nq, Nk)``, after pattern, bias and key logits.

    Args:
        lse: log-sum-exp of each query's logits; softmax only.
        rows: rows of ``A`` for chosen queries: integer indices ``(R,)``, or ``(B, R)`` to choose per sample; negative
            counts from the end (``rows=(-1,)`` is the last token, ``(0,)`` a class token in front). Indices on an
            accelerator stall it for the range check; numbers or a CPU tensor do not.
        received: attention received per key, ``A`` summed over queries: True = all queries, integer indices ``(R,)``
            or ``(B, R)`` = those (an index given twice counts twice), bool ``(Nq,)`` or ``(B, Nq)`` = where True.
        mass: name -> bool key group ``(Nk,)`` or ``(B, Nk)``; each query's attention mass on the group.
        entropy: entropy of each query's row, in nats (of the row divided by its sum, for sigmoid attention).
        maximum: the largest weight of each query's row.
        output_norm: L2 norm of each head's output, before ``head_scale``.
    """

    lse: bool = False
    rows: Tensor | Sequence[int] | None = None
    received: bool | Tensor = False
    mass: Mapping[str, Tensor] | None = None
    entropy: bool = False
    maximum: bool = False
    output_norm: bool = False


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of one attention call, None where not asked for; float32 (float64 for float64 inputs).

    A query that sees no key has lse ``-inf`` and zeros everywhere else.

    Attributes:
        lse: ``(B, Hq, Nq)`` log-sum-exp.
        rows: ``(B, Hq, R, Nk)`` softmaxed rows of the chosen queries, in the order asked.
        received: ``(B, Hq, Nk)`` attention received per key.
        mass: name -> ``(B, Hq, Nq)`` probability mass on the group.
        entropy: ``(B, Hq, Nq)`` nats.
        maximum: ``(B, Hq, Nq)`` largest weight.
        output_norm: ``(B, Hq, Nq)`` L2 norm of the head output before ``head_scale``.
        weights: the kind of weights described: ``"simplex"`` = non-negative and summing to one per query,
            ``"unnormalised"`` = non-negative with any sum, ``"signed"`` = of either sign.
    """

    lse: Tensor | None = None
    rows: Tensor | None = None
    received: Tensor | None = None
    mass: dict[str, Tensor] | None = None
    entropy: Tensor | None = None
    maximum: Tensor | None = None
    output_norm: Tensor | None = None
    weights: Literal["simplex", "unnormalised", "signed"] = "simplex"
