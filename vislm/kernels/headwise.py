"""One call per group of heads, for biases whose form differs between heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vislm.kernels.bias import Bias, HeadwiseBias
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.statistics import Statistics


def by_head(request: AttentionRequest, bias: HeadwiseBias) -> list[AttentionRequest]:
    """Return the calls of the heads with a low-rank bias and of those with a dense one."""
    return [
        _of_heads(request, bias.low_rank_heads, bias.low_rank),
        _of_heads(request, bias.dense_heads, bias.dense.expand(-1, len(bias.dense_heads), -1, -1)),
    ]


def joined(bias: HeadwiseBias, answers: Sequence[Answer]) -> Answer:
    """Return the answers of :func:`by_head` as one, with the heads in their order."""
    order = torch.tensor((*bias.low_rank_heads, *bias.dense_heads)).argsort()

    def join(get: Callable[[Answer], Tensor | None]) -> Tensor | None:
        parts = [part for part in map(get, answers) if part is not None]
        return torch.cat(parts, dim=1)[:, order.to(parts[0].device)] if parts else None

    first = answers[0].statistics
    names = ("lse", "rows", "received", "entropy", "maximum", "output_norm")
    fields = {name: join(lambda answer, name=name: getattr(answer.statistics, name)) for name in names}
    mass = None
    if first.mass is not None:
        mass = {name: join(lambda answer, name=name: (answer.statistics.mass or {})[name]) for name in first.mass}
    statistics = Statistics(**fields, mass=mass, weights=first.weights)  # pyright: ignore[reportArgumentType]
    return Answer(join(lambda answer: answer.output), statistics)


def _of_heads(request: AttentionRequest, heads: tuple[int, ...], bias: Bias) -> AttentionRequest:
    index = torch.tensor(heads, device=request.shape.device)
    groups = request.shape.num_heads // request.key.shape[1]

    def take(tensor: Tensor | None, by: Tensor) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, by]

    return replace(
        request,
        query=request.query[:, index],
        key=request.key[:, index // groups],
        value=None if request.value is None else request.value[:, index // groups],
        bias=bias,
        key_logits=take(request.key_logits, index),
    )
