"""Recording what an untouched vision tower computes, for methods that choose tokens behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import ImageView, TowerRecord, TowerSignal
from vislm.lmm.prompt.visuals import Origin
from vislm.lmm.state import SessionState

Name = tuple[int, str]
"""A method's place in the session and its name for the signal."""

SESSION = -1
"""Owner of signals that the session itself records, for all methods."""


class TowerRecorder:
    """Takes the signals that prompt stages ask for while the images are encoded, and deals them out by image."""

    def __init__(self, shared: SessionState, wanted: Mapping[Name, TowerSignal]) -> None:
        self.shared, self.wanted = shared, wanted
        self._calls: dict[str, _Call] = {}

    def install(self, hooks: Hooks) -> None:
        """Add the hooks and watch the attention of the layers whose signals are needed."""
        adapter = self.shared.adapter
        hooks.before(adapter.tower, self._start)
        if adapter.has_token_features:
            hooks.after(adapter.tower_layers[adapter.read_layer], self._read)
        by_layer: dict[int, list[Name]] = {}
        for name, signal in self.wanted.items():
            by_layer.setdefault(signal.layer, []).append(name)
        for layer, names in by_layer.items():
            hooks.watch(adapter.tower_attentions[layer], lambda call, out, n=tuple(names): self._take(call, out, n))

    def show(self, view: ImageView, owner: int, origin: Origin) -> None:
        """Complete a method's view of an image with what the tower computed for it."""
        adapter, encoding = self.shared.adapter, self.shared.encodings.get(origin.modality)
        if encoding is None:
            raise UsageError(
                "images that were encoded before the interventions were attached have no record of the vision tower; "
                "pass pixel_values inside the context"
            )
        arguments, call = encoding.arguments, self._calls[origin.modality]
        crops = adapter.crops(arguments)
        first, own = sum(crops[: origin.entries.start]), [crops[entry] for entry in origin.entries]
        share = slice(first, first + sum(own))
        view.tower = TowerRecord(
            {name: _deal(parts, share) for (who, name), parts in call.signals.items() if who in (owner, SESSION)},
            torch.cat(call.features)[share] if call.features else None,
            call.pixels[share] if call.pixels is not None and call.pixels.dim() == 4 else None,
        )
        if adapter.has_token_features:
            view.project = adapter.project

        def pack(maps: Tensor, newline: float) -> Tensor:
            parts = zip(origin.entries, maps.split(own), strict=True)
            return torch.cat([adapter.pack(part, arguments, entry, newline) for entry, part in parts])

        view.pack = pack

    def record(self, name: str, signal: Tensor) -> None:
        """Add what another part knows of the patches that were just encoded, (K, ...) for K crops."""
        self._calls[self._modality].signals[SESSION, name] = [signal]

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        self._calls[self._modality] = _Call(pixels, {name: [] for name in self.wanted})

    def _take(self, call: AttentionCall, out: Tensor, names: tuple[Name, ...]) -> Tensor:
        for name in names:
            self._calls[self._modality].signals[name].append(self.wanted[name].signal(call))
        return out

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._calls[self._modality].features.append(output[0] if isinstance(output, tuple) else output)

    @property
    def _modality(self) -> str:
        return self.shared.encoding or "image"


@dataclass
class _Call:
    """What one call of the tower left."""

    pixels: Tensor | None
    signals: dict[Name, list[Tensor]]
    features: list[Tensor] = field(default_factory=list)


def _deal(parts: list[Tensor], share: slice) -> Tensor:
    """Return one image's share of all crops: a tower attends once for all of them, or once for each (packed towers)."""
    return parts[0][share] if len(parts) == 1 else torch.cat(parts[share])
