"""Reading fixture files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislm.errors import AnnotationError

if TYPE_CHECKING:
    from torch import Tensor


class Unhandled(Exception):
    """A check does not know this kind of fixture, or lacks what it needs; the reason is the message."""


@dataclass(frozen=True)
class Comparison:
    """One compared output. Exact things have tolerance 0 and an error of 0 or infinity."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Skipped:
    """A part of a fixture that could not be compared, for want of data outside the fixture."""

    name: str


@dataclass
class Fixture:
    """One golden file."""

    path: Path
    method: str
    class_or_function: str
    kwargs: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """The whole object of a JSON fixture."""
    data_dirs: list[Path] = field(default_factory=list)
    """Folders that may hold data sets which a fixture refers to."""


def read_fixture(path: Path, data_dirs: list[Path] | None = None) -> Fixture:
    """Read a ``.safetensors`` or ``.json`` fixture.

    Raises:
        AnnotationError: the file is broken or names no method.
    """
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            meta = data["meta"]
            kwargs = meta.get("kwargs", {})
            return Fixture(
                path,
                meta["method"].lower(),
                meta.get("class_or_function", ""),
                kwargs,
                data=data,
                data_dirs=data_dirs or [],
            )
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        kwargs = json.loads(meta.get("kwargs", "{}"))
        fixture = Fixture(
            path, meta["method"].lower(), meta.get("class_or_function", ""), kwargs, data_dirs=data_dirs or []
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnnotationError(f"{path} is not a golden fixture: {error!r}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            raise AnnotationError(f"{path} is not a golden fixture: {error}") from error
        raise
    groups = {"param": fixture.params, "in": fixture.inputs, "out": fixture.outputs, "grad": fixture.grads}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        if group in groups:
            groups[group][name] = tensor
    return fixture


def difference(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Comparison:
    """Compare floats: the maximum absolute error, infinite for different shapes."""
    if ours.shape != theirs.shape:
        return Comparison(
            f"{name} (shape {tuple(ours.shape)}, expected {tuple(theirs.shape)})", float("inf"), tolerance
        )
    return Comparison(name, (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0, tolerance)


def relative(name: str, ours: Tensor, theirs: Tensor, absolute: float, ratio: float) -> Comparison:
    """Compare floats with tolerance ``absolute + ratio |theirs|``, scaled so that ``absolute`` is the bound."""
    if ours.shape != theirs.shape:
        return difference(name, ours, theirs, absolute)
    error = (ours.double() - theirs.double()).abs() / (1.0 + ratio / absolute * theirs.double().abs())
    return Comparison(name, error.max().item() if ours.numel() else 0.0, absolute)


def exact(name: str, ours: Any, theirs: Any) -> Comparison:
    """Compare indices, masks, counts, texts."""
    ours = ours.tolist() if hasattr(ours, "tolist") else ours
    theirs = theirs.tolist() if hasattr(theirs, "tolist") else theirs
    return Comparison(name, 0.0 if ours == theirs else float("inf"), 0.0)
