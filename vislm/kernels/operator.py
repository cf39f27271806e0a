"""The attention operator: one set of options, several backends, statistics without the attention matrix."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.backends import Explanation, choose, explain_choice
from vislm.kernels.bias import Bias, HeadwiseBias
from vislm.kernels.checks import autocasted, autocasts, checked_head_scale, checked_request
from vislm.kernels.headwise import by_head, joined
from vislm.kernels.lowering import lowered
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import Dense, Pattern
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.shapes import shape_of
from vislm.kernels.statistics import Statistics, StatisticsRequest
from vislm.kernels.traced import is_traced, traced
from vislm.kernels.written import Options

_DENSE = Dense()


class Attended(NamedTuple):
    """What :func:`attend` returns when statistics are asked for."""

    output: Tensor
    statistics: Statistics


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern = ...,
    bias: Bias | None = ...,
    scale: float | None = ...,
    normalize: str | Sigmoid = ...,
    statistics: None = ...,
    head_scale: Tensor | None = ...,
    key_logits: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern = ...,
    bias: Bias | None = ...,
    scale: float | None = ...,
    normalize: str | Sigmoid = ...,
    statistics: StatisticsRequest,
    head_scale: Tensor | None = ...,
    key_logits: Tensor | None = ...,
    backend: str | None = ...,
) -> Attended: ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern = _DENSE,
    bias: Bias | None = None,
    scale: float | None = None,
    normalize: str | Sigmoid = "softmax",
    statistics: StatisticsRequest | None = None,
    head_scale: Tensor | None = None,
    key_logits: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | Attended:
    """Return the attention output ``head_scale * normalize(scale q k^T + bias + key_logits) v``.

    A query that sees no key gives output 0 (and lse ``-inf``, all other statistics 0).

    Args:
        query: ``(B, Hq, Nq, D)``, float16, bfloat16, float32 or float64. Under ``torch.autocast`` query, key and value
            take its dtype, as with any attention of PyTorch.
        key: ``(B, Hkv, Nk, D)``; ``Hq`` is a multiple of ``Hkv``, query head ``h`` uses key head ``h // (Hq / Hkv)``.
        value: ``(B, Hkv, Nk, Dv)``.
        pattern: which query sees which key: ``Dense()``, ``Causal()``, ``Padded(valid)``, ``Masked(allowed)``, or on a
            grid ``Neighborhood(grid, window)``, ``Blocked(grid, block, halo)``, ``Window(grid, window, shift)``.
        bias: additive logits: a tensor that broadcasts to ``(B, Hq, Nq, Nk)`` and may hold ``-inf``, a
            :class:`RelativeBias`, :class:`DecoupledBias`, :class:`LowRankBias` or :class:`HeadwiseBias`. Gradients
            reach all of them.
        scale: factor of the dot products, None = ``D ** -0.5``.
        normalize: how logits become weights: ``"softmax"``, ``"sigmoid"`` or a :class:`Sigmoid`.
        statistics: what to measure on the way; see :class:`StatisticsRequest`.
        head_scale: ``(Hq,)`` or ``(B, Hq)``, multiplies each head's output (head reweighting).
        key_logits: ``(Nk,)``, ``(B, Nk)`` or ``(B, Hq, Nk)``, added to the logits of keys: ``log(size)`` of merged
            tokens, ``log(gamma)`` of reweighted ones, ``-inf`` of removed ones.
        backend: a backend's name; None = ``$VISLM_BACKEND`` or else the first that supports the call.

    Returns:
        The output ``(B, Hq, Nq, Dv)`` in the query's dtype; with ``statistics`` an :class:`Attended` ``(output,
        statistics)``.

    Raises:
        UsageError: inputs that do not fit together.
        UnknownName: an unknown ``backend`` or ``normalize``.
        BackendUnavailable: the forced backend cannot run this call.
    """
    options = Options(pattern, bias, key_logits, scale, normalize, statistics, backend)
    if is_traced(options):
        output, measured = traced(autocasted(query), autocasted(key), autocasted(value), options)
        factors = checked_head_scale(head_scale, shape_of(query, key))
    else:
        request = _request(query, key, value, pattern, bias, scale, normalize, statistics, key_logits)
        factors = checked_head_scale(head_scale, request.shape)
        # PyTorch's own attention is what its compilers know best.
        answer = _run(request, "torch" if backend is None and torch.compiler.is_compiling() else backend)
        output, measured = cast(Tensor, answer.output), answer.statistics  # there is an output because of the value
    if factors is not None:
        output = (output * factors).to(output.dtype)
    return output if statistics is None else Attended(output, measured)


def attention_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    request: StatisticsRequest,
    pattern: Pattern = _DENSE,
    bias: Bias | None = None,
    scale: float | None = None,
    normalize: str | Sigmoid = "softmax",
    key_logits: Tensor | None = None,
    backend: str | None = None,
) -> Statistics:
    """Return the statistics of an attention without computing its output (unless ``output_norm`` needs it).

    Takes the options of :func:`attend`; ``value`` is needed for ``request.output_norm`` only.
    """
    options = Options(pattern, bias, key_logits, scale, normalize, request, backend)
    if is_traced(options):
        needed = autocasted(value) if request.output_norm and value is not None else None
        return traced(autocasted(query), autocasted(key), needed, options)[1]
    checked = _request(query, key, value, pattern, bias, scale, normalize, request, key_logits)
    if not request.output_norm:
        checked = dataclasses.replace(checked, value=None)
    elif value is None:
        raise UsageError("StatisticsRequest(output_norm=True) needs value=")
    return _run(checked, backend).statistics


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern = _DENSE,
    bias: Bias | None = None,
    scale: float | None = None,
    normalize: str | Sigmoid = "softmax",
    statistics: StatisticsRequest | None = None,
    head_scale: Tensor | None = None,
    key_logits: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Return which backend :func:`attend` would use for these arguments, and why the others are passed over.

    ``print(explain(query, key, value, ...))`` shows the table. Computes nothing.
    """
    request = _request(query, key, value, pattern, bias, scale, normalize, statistics, key_logits)
    checked_head_scale(head_scale, request.shape)
    if isinstance(request.bias, HeadwiseBias):
        request = by_head(request, request.bias)[-1]  # the heads with a dense bias: fewer backends take them
    return explain_choice(lowered(request)[0], backend)


def _request(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pattern: Pattern,
    bias: Bias | None,
    scale: float | None,
    normalize: str | Sigmoid,
    statistics: StatisticsRequest | None,
    key_logits: Tensor | None,
) -> AttentionRequest:
    return checked_request(
        autocasted(query),
        autocasted(key),
        None if value is None else autocasted(value),
        pattern=pattern,
        bias=bias,
        scale=scale,
        normalize=normalize,
        statistics=statistics,
        key_logits=key_logits,
    )


def _run(request: AttentionRequest, backend: str | None) -> Answer:
    if isinstance(request.bias, HeadwiseBias):
        return joined(request.bias, [_run(part, backend) for part in by_head(request, request.bias)])
    dtype = request.query.dtype
    request, restore = lowered(request)
    chosen = choose(request, backend)
    device = request.shape.device.type
    if autocasts(device):
        with torch.autocast(device, enabled=False):  # the tensors have their dtype now; statistics stay in float32
            answer = restore(chosen.run(request))
    else:
        answer = restore(chosen.run(request))
    return answer if answer.output is None else answer._replace(output=answer.output.to(dtype))
