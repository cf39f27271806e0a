"""Attention as one node of a traced graph, for ``torch.compile`` and ``torch.export``.

How a call runs depends on tables of its pattern, on the device and on what is installed. A tracer should not look into
that, so that here the call is an operator of PyTorch's own registry: tensors, and one text that describes the rest.
The text is read when the operator runs.
"""

from __future__ import annotations

import ast
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vislm.kernels.bias import AxialBias, Bias, DecoupledBias, LowRankBias, RelativeBias
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import Blocked, Causal, Dense, Masked, Neighborhood, Padded, Pattern, Window

_WRITTEN = {
    kind.__name__: kind
    for kind in (
        *(Blocked, Causal, Dense, Masked, Neighborhood, Padded, Window),
        *(AxialBias, DecoupledBias, LowRankBias, RelativeBias, Sigmoid),
    )
}


class Options(NamedTuple):
    """What :func:`vislm.attend` takes beside query, key and value; no statistics and no head scales."""

    pattern: Pattern
    bias: Bias | None
    key_logits: Tensor | None
    scale: float | None
    normalize: str | Sigmoid
    backend: str | None


def is_traced(options: Options) -> bool:
    """Return whether a tracer is running and the call is more than PyTorch's own attention."""
    if not torch.compiler.is_compiling():
        return False
    return not (isinstance(options.pattern, Dense) and options.bias is None and options.key_logits is None)


def traced(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """Return the output ``(B, Hq, Nq, Dv)`` of the call, as one node of the graph."""
    tensors: list[Tensor] = []
    text = _written(tuple(options), tensors)
    return torch.ops.vislm.attend(query, key, value, tensors, text)


def _written(given: Any, tensors: list[Tensor]) -> str:
    """Return a value as a Python literal; tensors go into the list, objects become ``{"": class, field: value}``."""
    if isinstance(given, Tensor):
        tensors.append(given)
        return f"{{'tensor': {len(tensors) - 1}}}"
    if isinstance(given, tuple):
        return "(" + "".join([_written(entry, tensors) + ", " for entry in given]) + ")"
    if given is None or isinstance(given, (bool, str, float)):
        return repr(given)
    if isinstance(given, (int, torch.SymInt)):
        return repr(int(given))
    entries = [f"'{field.name}': {_written(getattr(given, field.name), tensors)}" for field in fields(given)]
    return f"{{'': '{type(given).__name__}', {', '.join(entries)}}}"


def _read(literal: Any, tensors: list[Tensor]) -> Any:
    """Return what :func:`_written` wrote."""
    if isinstance(literal, tuple):
        return tuple(_read(entry, tensors) for entry in literal)
    if not isinstance(literal, dict):
        return literal
    if "tensor" in literal:
        return tensors[literal["tensor"]]
    kind = literal.pop("")
    return _WRITTEN[kind](**{name: _read(entry, tensors) for name, entry in literal.items()})


def _attend(query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    from vislm.kernels.operator import attend

    options = Options(*_read(ast.literal_eval(text), tensors))
    device = query.device.type
    if not torch.amp.is_autocast_available(device):
        return attend(query, key, value, **options._asdict()).contiguous()
    with torch.autocast(device, enabled=False):  # the tensors have their dtype now
        return attend(query, key, value, **options._asdict()).contiguous()


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], text: str
) -> list[Tensor]:
    """Return the gradients of query, key, value and the tensors that are floating-point, from a second forward pass."""
    given = [query, key, value, *tensors]
    copies = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in given]
    wanted = [tensor for tensor in copies if tensor.requires_grad]
    with torch.enable_grad():
        output = _attend(copies[0], copies[1], copies[2], copies[3:], text)
        found = torch.autograd.grad(output, wanted, grad, allow_unused=True)
    return [_own(gradient, tensor) for gradient, tensor in zip(found, wanted, strict=True)]


def _own(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """Return a gradient in memory of its own and row-major, as the graph was told."""
    if gradient is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return gradient.clone(memory_format=torch.contiguous_format)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _gradients_shape(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor], text: str
) -> list[Tensor]:
    given = [tensor for tensor in (query, key, value, *tensors) if tensor.is_floating_point()]
    return [tensor.new_empty(tensor.shape) for tensor in given]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, tensors, ctx.text = inputs
    ctx.save_for_backward(query, key, value, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, *tensors = ctx.saved_tensors
    found = iter(torch.ops.vislm.attend_gradients(grad, query, key, value, tensors, ctx.text))
    gradients = [next(found) if tensor.is_floating_point() else None for tensor in (query, key, value, *tensors)]
    return (*gradients[:3], gradients[3:], None)


_LIBRARY = torch.library.Library("vislm", "DEF")
_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor[] tensors, str text"
_LIBRARY.define(f"attend({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"attend_gradients(Tensor grad, {_ARGUMENTS}) -> Tensor[]")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("vislm::attend", _attend_shape, lib=_LIBRARY)
torch.library.register_fake("vislm::attend_gradients", _gradients_shape, lib=_LIBRARY)
torch.library.register_autograd("vislm::attend", _backward, setup_context=_remember, lib=_LIBRARY)
