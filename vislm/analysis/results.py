"""What an analysis found: plain tensors, and a header that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vislm.errors import AnnotationError, UsageError
from vislm.files import atomic_write

TENSORS, HEADER = "analysis.safetensors", "analysis.json"


@dataclass
class Analysis:
    """Tensors ``[layer, head, ...]`` by name; NaN where a layer or head has no such value."""

    header: dict[str, Any] = field(default_factory=dict)
    """JSON: model, layers, heads, dtype, options, words for what the tensors hold."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Tensor -> its axes and unit in words."""

    def add(self, name: str, tensor: Tensor, note: str) -> None:
        """Keep a tensor (on the CPU, detached) under a new name."""
        if name in self.tensors:
            raise UsageError(f"tensor {name!r} was added twice")
        self.tensors[name], self.notes[name] = tensor.detach().cpu().contiguous(), note

    def measure(self, name: str, tensor: Tensor, title: str, note: str) -> None:
        """Keep a head map (L, H) under a title for pictures."""
        self.add(name, tensor.float(), note)
        self.header.setdefault("measures", {})[name] = title

    def curves(self, name: str, tensor: Tensor, title: str, note: str, labels: Sequence[str], unit: str = "") -> None:
        """Keep values by layer (series, L), one label per series, under a title for pictures."""
        if len(labels) != len(tensor):
            raise UsageError(f"{len(labels)} labels for {len(tensor)} series of {name}")
        self.add(name, tensor.float(), note)
        self.header.setdefault("curves", {})[name] = {"title": title, "labels": list(labels), "unit": unit}

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``analysis.safetensors`` and ``analysis.json`` into a folder and return their paths."""
        from safetensors.torch import save

        folder = Path(folder)
        described = {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "note": self.notes[name]}
            for name, t in self.tensors.items()
        }
        # cloned: safetensors refuses tensors that share memory
        content = save({name: tensor.clone() for name, tensor in self.tensors.items()})
        with atomic_write(folder / TENSORS, "wb") as handle:
            handle.write(content)
        with atomic_write(folder / HEADER) as handle:
            json.dump({**self.header, "tensors": described}, handle, indent=1, ensure_ascii=False)
            handle.write("\n")
        return folder / TENSORS, folder / HEADER

    @classmethod
    def load(cls, folder: Path) -> Analysis:
        """Read what :meth:`save` wrote.

        Raises:
            AnnotationError: files that are missing or broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
            notes = {name: entry["note"] for name, entry in header.pop("tensors").items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise AnnotationError(f"{folder} holds no analysis: {error}") from error
        return cls(header, tensors, notes)


def padded_stack(parts: Mapping[int, Tensor] | list[Tensor], size: int | None = None) -> Tensor:
    """Return tensors (a_i, b_i, ...) as one (n, max a, max b, ...), NaN where a part ends earlier.

    Args:
        parts: in order, or by place; places without a part are NaN.
        size: n; None: as many as there are.
    """
    by_place = dict(enumerate(parts)) if isinstance(parts, list) else dict(parts)
    if not by_place:
        raise UsageError("nothing to stack")
    sides = [max(sizes) for sizes in zip(*(p.shape for p in by_place.values()), strict=True)]
    count = size or max(by_place) + 1
    stacked = torch.full((count, *sides), torch.nan)
    for place, part in by_place.items():
        stacked[(place, *(slice(side) for side in part.shape))] = part.float().cpu()
    return stacked
