"""The options of a call as one text and a list of tensors, and back: what an operator of PyTorch's registry takes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vislm.kernels.bias import AxialBias, Bias, DecoupledBias, HeadwiseBias, LowRankBias, RelativeBias
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import PATTERNS, Pattern
from vislm.kernels.statistics import StatisticsRequest

_BIASES = (AxialBias, DecoupledBias, HeadwiseBias, LowRankBias, RelativeBias)
WRITTEN = {kind.__name__: kind for kind in (*PATTERNS, *_BIASES, Sigmoid, StatisticsRequest)}
"""Name -> class of the objects among the options."""


class Options(NamedTuple):
    """What :func:`vislm.attend` takes beside query, key and value, but for head scales, which come after it."""

    pattern: Pattern
    bias: Bias | None
    key_logits: Tensor | None
    scale: float | None
    normalize: str | Sigmoid
    statistics: StatisticsRequest | None
    backend: str | None


def write(options: Options) -> tuple[list[Tensor], str]:
    """Return the options' tensors, and everything else as a Python literal."""
    tensors: list[Tensor] = []
    return tensors, _written(tuple(options), tensors)


def read(tensors: list[Tensor], text: str) -> Options:
    """Return the options that :func:`write` wrote."""
    return Options(*_read(ast.literal_eval(text), tensors))


def _written(given: Any, tensors: list[Tensor]) -> str:
    if isinstance(given, Tensor):
        tensors.append(given)
        return f"{{'tensor': {len(tensors) - 1}}}"
    if given is None or isinstance(given, str):
        return repr(given)
    if isinstance(given, torch.SymInt):
        return repr(int(given))
    if isinstance(given, (int, float)):
        return f"{given}"  # torch.compile follows this for a number that it holds to be any number, but not repr
    if isinstance(given, (tuple, list)):
        return "(" + "".join([_written(entry, tensors) + ", " for entry in given]) + ")"
    if isinstance(given, Mapping):
        entries = [f"{name!r}: {_written(entry, tensors)}" for name, entry in given.items()]
        return f"{{'mapping': {{{', '.join(entries)}}}}}"
    entries = [f"'{field.name}': {_written(getattr(given, field.name), tensors)}" for field in fields(given)]
    return f"{{'{type(given).__name__}': {{{', '.join(entries)}}}}}"


def _read(literal: Any, tensors: list[Tensor]) -> Any:
    if isinstance(literal, tuple):
        return tuple(_read(entry, tensors) for entry in literal)
    if not isinstance(literal, dict):
        return literal
    ((kind, content),) = literal.items()
    if kind == "tensor":
        return tensors[content]
    entries = {name: _read(entry, tensors) for name, entry in content.items()}
    return entries if kind == "mapping" else WRITTEN[kind](**entries)
