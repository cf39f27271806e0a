"""Loading weights, with every key that does not fit named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from vislm.errors import CheckpointError

SHOWN = 5


def load_file(model: nn.Module, path: Path) -> None:
    """Load a safetensors file of the model's own state dict; raise ``CheckpointError`` where it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file as read

    try:
        state = read(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}") from error
    load_state(model, state, str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into the model, all of it or none.

    Batch normalisation's step counters may be missing.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, with the nearest names.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key in state if key in own and state[key].shape != own[key].shape]
    lines = [
        *_listed("missing", missing, lambda key: _near(key, unexpected)),
        *_listed("unexpected", unexpected, lambda key: _near(key, missing)),
        *_listed("misshapen", misshapen, lambda key: f"{tuple(state[key].shape)}, expected {tuple(own[key].shape)}"),
    ]
    if lines:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}:\n" + "\n".join(lines))
    model.load_state_dict(state, strict=False)


def _near(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"near to {near[0]}" if near else ""


def _listed(kind: str, keys: list[str], remark: Callable[[str], str]) -> Iterator[str]:
    if keys:
        yield f"  {len(keys)} {kind}:"
        yield from (f"    {key}  {remark(key)}".rstrip() for key in keys[:SHOWN])
    if len(keys) > SHOWN:
        yield "    ..."
