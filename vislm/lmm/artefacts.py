"""Files of what was found out about a model beforehand: head lists, head factors, sink dimensions.

One JSON object: ``kind`` ("heads", "factors" or "sink_dims"), ``method``, ``model`` (see :func:`fingerprint`), and
under the kind's own key ("heads", "factors", "dims") the entries: ``[layer, head]``, ``[layer, head, gamma]`` or a
hidden dimension. Other keys are notes. Options that take such a file also take the entries themselves, as tuples or as
text such as ``16/29+26/9`` and ``3/0/1.5``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.lmm.adapters import Adapter

Kind = Literal["heads", "factors", "sink_dims"]
Heads = tuple[tuple[int, int], ...]
"""(layer, head) pairs."""
Factors = tuple[tuple[int, int, float], ...]
"""(layer, head, gamma) triples."""

_ENTRIES = {"heads": "heads", "factors": "factors", "sink_dims": "dims"}
_WIDTH = {"heads": 2, "factors": 3, "sink_dims": 1}
_EXAMPLE = {"heads": "16/29+26/9", "factors": "3/0/1.5+4/7/0.8", "sink_dims": "1415+2533"}
_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that tell models apart, the same in every precision.

    The hash of all parameters' names and shapes and of the signs of 64 evenly spaced entries of each: a conversion to
    another precision keeps signs, a fine-tuning flips some of them.
    """
    digest = hashlib.sha256()
    signs = []
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        if len(flat):
            signs.append(torch.signbit(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float()).cpu())
    digest.update(torch.cat(signs).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_artefact(
    path: str | os.PathLike[str],
    kind: Kind,
    method: str,
    model: nn.Module,
    entries: Iterable[Sequence[float] | int],
    **notes: Any,
) -> None:
    """Write an artefact for ``model``.

    Args:
        path: of the new JSON file; an old one is replaced at once or not at all.
        kind: what the entries are.
        method: name of the method that they are for.
        model: the transformers model that they were found on.
        entries: (layer, head), (layer, head, gamma), or dimensions.
        notes: further keys, e.g. how the entries were found.
    """
    content = {"kind": kind, "method": method, "model": fingerprint(model), _ENTRIES[kind]: list(entries), **notes}
    with atomic_write(path) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")


def head_list(value: str | Heads, adapter: Adapter, methods: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Return layer -> heads, ascending, of an option: a file of kind "heads", or the (layer, head) pairs themselves.

    Args:
        value: a path, text such as ``16/29+26/9``, or pairs.
        adapter: of the model in use, which has to have these layers and heads.
        methods: names of methods whose files are right here; the first one is named in errors.

    Raises:
        UsageError: a file that cannot be read, is of another kind, method or model; a head that does not exist.
    """
    found: dict[int, set[int]] = {}
    for layer, head in _entries(value, "heads", adapter, methods):
        found.setdefault(int(layer), set()).add(int(head))
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(found.items())}


def head_factors(value: str | Factors, adapter: Adapter, methods: Sequence[str]) -> dict[int, dict[int, float]]:
    """Return layer -> head -> factor of an option: a file of kind "factors", or (layer, head, gamma) triples.

    Arguments and errors are those of :func:`head_list`; a factor is a number > 0.
    """
    found: dict[int, dict[int, float]] = {}
    for layer, head, gamma in _entries(value, "factors", adapter, methods):
        if not 0.0 < gamma < math.inf:
            raise UsageError(f"{methods[0]}: factor {gamma} of layer {layer} head {head}; expected a number > 0")
        found.setdefault(int(layer), {})[int(head)] = float(gamma)
    return {layer: dict(sorted(heads.items())) for layer, heads in sorted(found.items())}


def sink_dims(value: str | tuple[int, ...], adapter: Adapter, methods: Sequence[str]) -> tuple[int, ...]:
    """Return hidden dimensions, ascending, of an option: a file of kind "sink_dims", or the dimensions themselves.

    Arguments and errors are those of :func:`head_list`.
    """
    return tuple(sorted({int(dim) for (dim,) in _entries(value, "sink_dims", adapter, methods)}))


def _entries(value: Any, kind: Kind, adapter: Adapter, methods: Sequence[str]) -> list[tuple[float, ...]]:
    where = f"{methods[0]}: {_ENTRIES[kind]}"
    if isinstance(value, str):
        literal = set(value) <= set("0123456789./+")
        rows = _from_text(value, kind, where) if literal else _from_file(Path(value), kind, adapter, methods)
    else:
        rows = value
    config, entries = adapter.text_config, []
    limits = (len(adapter.layers), config.num_attention_heads) if kind != "sink_dims" else (config.hidden_size,)
    for row in rows:
        entry = tuple(row) if isinstance(row, (list, tuple)) else (row,)
        numbers = len(entry) == _WIDTH[kind] and all(isinstance(n, (int, float)) for n in entry)
        if not numbers or any(not float(n).is_integer() for n in entry[: len(limits)]):
            raise UsageError(f"{where}: entry {row!r}; expected entries such as {_EXAMPLE[kind]}")
        if any(not 0 <= n < limit for n, limit in zip(entry, limits, strict=False)):
            has = " layers of ".join(map(str, limits)) + (" heads" if kind != "sink_dims" else " dimensions")
            raise UsageError(f"{where}: entry {row!r} lies outside the model, which has {has}")
        entries.append(entry)
    return entries


def _from_text(text: str, kind: Kind, where: str) -> list[tuple[float, ...]]:
    try:
        return [
            tuple(float(n) if "." in n else int(n) for n in part.split("/")) for part in filter(None, text.split("+"))
        ]
    except ValueError as error:
        raise UsageError(f"{where}={text!r}; expected entries such as {_EXAMPLE[kind]}, or an artefact") from error


def _from_file(path: Path, kind: Kind, adapter: Adapter, methods: Sequence[str]) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the artefact {path} (nor is it {_EXAMPLE[kind]} or the like): {error}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(_ENTRIES[kind], []), list):
        raise UsageError(f"{path} is not an artefact: expected an object with kind, method, model and {_ENTRIES[kind]}")
    if content.get("kind") != kind or _ENTRIES[kind] not in content:
        raise UsageError(f"{path} is an artefact of kind {content.get('kind')!r}; {methods[0]} needs {kind!r}")
    if content.get("method") not in methods:
        raise UsageError(f"{path} was made for {content.get('method')!r}, not for {' or '.join(methods)}")
    if content.get("model") != (mine := fingerprint(adapter.model)):
        raise UsageError(
            f"{path} was made for a model with fingerprint {content.get('model')!r}; this one has {mine!r}: make it "
            "anew with vislm calibrate-heads"
        )
    return content[_ENTRIES[kind]]
