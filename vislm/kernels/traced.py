"""Attention as one node of a traced graph, for ``torch.compile`` and ``torch.export``.

How a call runs depends on tables of its pattern, on the device and on what is installed. A tracer should not look into
that, so that here the call is an operator of PyTorch's own registry: tensors, and one text that describes the rest.
The text is read when the operator runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vislm.kernels.patterns import Blocked, Dense
from vislm.kernels.statistics import Statistics, StatisticsRequest
from vislm.kernels.written import Options, read, write

_PER_QUERY = ("lse", "entropy", "maximum", "output_norm")


def is_traced(options: Options) -> bool:
    """Return whether a tracer is running and the call is more than PyTorch's own attention."""
    if not torch.compiler.is_compiling():
        return False
    plain = options.bias is None and options.key_logits is None and options.statistics is None
    return not (plain and isinstance(options.pattern, Dense) and options.normalize == "softmax")


def traced(query: Tensor, key: Tensor, value: Tensor | None, options: Options) -> tuple[Tensor, Statistics]:
    """Return the output ``(B, Hq, Nq, Dv)``, empty without a value, and the statistics: one node of the graph."""
    output, *measured = torch.ops.vislm.attend(query, key, value, *write(options))
    border = isinstance(options.pattern, Blocked) and options.pattern.border == "zero"
    weights = "simplex" if options.normalize == "softmax" and not border else "unnormalised"
    return output, _named(options.statistics, measured, weights)


def _named(
    request: StatisticsRequest | None, measured: Sequence[Tensor], weights: Literal["simplex", "unnormalised"]
) -> Statistics:
    """Return the tensors of :func:`_listed` as statistics."""
    if request is None:
        return Statistics(weights=weights)
    rest = list(measured)
    fields: dict[str, Any] = {name: rest.pop(0) for name in _PER_QUERY if getattr(request, name)}
    fields["rows"] = None if request.rows is None else rest.pop(0)
    fields["received"] = None if request.received is False else rest.pop(0)
    fields["mass"] = None if request.mass is None else dict(zip(request.mass, rest, strict=True))
    return Statistics(**fields, weights=weights)


def _listed(statistics: Statistics) -> list[Tensor]:
    """Return the statistics there are, in the order of :func:`_named`."""
    fields = [getattr(statistics, name) for name in (*_PER_QUERY, "rows", "received")]
    return [field for field in fields if field is not None] + list((statistics.mass or {}).values())


def _attend(query: Tensor, key: Tensor, value: Tensor | None, tensors: list[Tensor], text: str) -> list[Tensor]:
    from vislm.kernels.operator import attend, attention_statistics  # these call this module

    given = read(tensors, text)._asdict()
    device = query.device.type
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with exact:  # the tensors have their dtype now
        if value is None:
            request = given.pop("statistics")
            answer = query.new_empty(0), attention_statistics(query, key, request=request, **given)
        elif given["statistics"] is None:
            answer = attend(query, key, value, **given), Statistics()
        else:
            answer = attend(query, key, value, **given)
    return [tensor.contiguous() for tensor in (answer[0], *_listed(answer[1]))]


def _attend_shapes(query: Tensor, key: Tensor, value: Tensor | None, tensors: list[Tensor], text: str) -> list[Tensor]:
    request, rows = read(tensors, text).statistics or StatisticsRequest(), query.shape[:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shapes: list[tuple[int, ...]] = [rows for name in _PER_QUERY if getattr(request, name)]
    if request.rows is not None:
        chosen = request.rows.shape[-1] if isinstance(request.rows, Tensor) else len(request.rows)
        shapes.append((*rows[:2], chosen, key.shape[2]))
    if request.received is not False:
        shapes.append((*rows[:2], key.shape[2]))
    shapes += [rows for _ in request.mass or ()]
    output = query.new_empty(0) if value is None else query.new_empty(*rows, value.shape[-1])
    return [output, *(query.new_empty(shape, dtype=dtype) for shape in shapes)]


def _gradients(
    grads: list[Tensor], query: Tensor, key: Tensor, value: Tensor | None, tensors: list[Tensor], text: str
) -> list[Tensor]:
    """Return the gradients of :func:`_inputs`, from a second forward pass."""
    copies = [tensor.detach().requires_grad_() for tensor in _inputs(query, key, value, tensors)]
    rest = iter(copies)
    again = [None if tensor is None else next(rest) for tensor in (query, key, value)]
    others = [next(rest) if tensor.is_floating_point() else tensor for tensor in tensors]
    with torch.enable_grad():
        outputs = _attend(again[0], again[1], again[2], others, text)  # pyright: ignore[reportArgumentType]
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        of, slopes = [output for output, _ in pairs], [grad for _, grad in pairs]
        found = torch.autograd.grad(of, copies, slopes, allow_unused=True)
    return [_own(gradient, tensor) for gradient, tensor in zip(found, copies, strict=True)]


def _inputs(query: Tensor, key: Tensor, value: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors of a call that may have gradients."""
    given = (query, key, *(() if value is None else (value,)), *tensors)
    return [tensor for tensor in given if tensor.is_floating_point()]


def _own(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """Return a gradient in memory of its own and row-major, as the graph was told."""
    if gradient is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return gradient.clone(memory_format=torch.contiguous_format)


def _gradients_shapes(
    grads: list[Tensor], query: Tensor, key: Tensor, value: Tensor | None, tensors: list[Tensor], text: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in _inputs(query, key, value, tensors)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    query, key, value, tensors, ctx.text = inputs
    ctx.without_value = value is None
    ctx.outputs = [(tensor.shape, tensor.dtype) for tensor in output]
    ctx.save_for_backward(query, key, *(() if value is None else (value,)), *tensors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    query, key, *rest = ctx.saved_tensors
    pairs = zip(ctx.outputs, grads, strict=True)
    given = [query.new_zeros(shape, dtype=dtype) if grad is None else grad for (shape, dtype), grad in pairs]
    value = None if ctx.without_value else rest.pop(0)
    found = iter(torch.ops.vislm.attend_gradients(given, query, key, value, rest, ctx.text))
    of_three = [None if tensor is None else next(found) for tensor in (query, key, value)]
    return (*of_three, [next(found) if tensor.is_floating_point() else None for tensor in rest], None)


_LIBRARY = torch.library.Library("vislm", "DEF")
_ARGUMENTS = "Tensor query, Tensor key, Tensor? value, Tensor[] tensors, str text"
_LIBRARY.define(f"attend({_ARGUMENTS}) -> Tensor[]")
_LIBRARY.define(f"attend_gradients(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("vislm::attend", _attend_shapes, lib=_LIBRARY)
torch.library.register_fake("vislm::attend_gradients", _gradients_shapes, lib=_LIBRARY)
torch.library.register_autograd("vislm::attend", _backward, setup_context=_remember, lib=_LIBRARY)
