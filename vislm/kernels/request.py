"""One validated attention call, as every backend sees it, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vislm.kernels.bias import Bias, tensors_of
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import Pattern
from vislm.kernels.shapes import Shape, shape_of
from vislm.kernels.statistics import Statistics


@dataclass(frozen=True, eq=False)
class CheckedStatistics:
    """A :class:`StatisticsRequest` with every tensor in one layout and on the query's device.

    ``rows`` and ``received_queries`` are int64 ``(1 or B, R)`` and non-negative; ``received_where`` is bool
    ``(1 or B, Nq)``; ``mass`` holds bool ``(1 or B, Nk)``. At most one of the three ``received*`` is set.
    """

    lse: bool
    rows: Tensor | None
    received: bool
    received_queries: Tensor | None
    received_where: Tensor | None
    mass: dict[str, Tensor] | None
    entropy: bool
    maximum: bool
    output_norm: bool


@dataclass(frozen=True, eq=False)
class AttentionRequest:
    """The validated inputs of one call.

    Attributes:
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hkv, Nk, D)``.
        value: ``(B, Hkv, Nk, Dv)``, or None when only statistics are wanted that need no output.
        pattern: fitted to this call's shape.
        bias: None, additive logits ``(1 or B, 1 or Hq, 1 or Nq, 1 or Nk)``, or another :data:`Bias`; backends see
            only those that :func:`vislm.kernels.lowering.lowered` leaves.
        key_logits: None or additive logits ``(1 or B, 1 or Hq, 1, Nk)``.
        scale: factor of ``q @ k^T``.
        normalize: ``"softmax"``, or a :class:`Sigmoid` with its bias filled in.
        statistics: what is wanted beside the output, possibly nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    pattern: Pattern
    bias: Bias | None
    key_logits: Tensor | None
    scale: float
    normalize: Literal["softmax"] | Sigmoid
    statistics: CheckedStatistics

    @property
    def shape(self) -> Shape:
        """``(B, Hq, Nq, Nk)`` and the device."""
        return shape_of(self.query, self.key)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics and of exact arithmetic: float32, or float64 for float64 inputs."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def weights(self) -> Literal["simplex", "unnormalised"]:
        """The kind of weights that this call's normalisation gives."""
        return "simplex" if self.normalize == "softmax" else "unnormalised"

    @property
    def differentiable(self) -> bool:
        """Whether autograd will want gradients of this call."""
        tensors = (self.query, self.key, self.value, *tensors_of(self.bias), self.key_logits)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class Answer(NamedTuple):
    """What a backend returns: the output ``(B, Hq, Nq, Dv)``, None if ``value`` was None, and the statistics wanted."""

    output: Tensor | None
    statistics: Statistics
