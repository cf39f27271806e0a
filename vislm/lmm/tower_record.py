"""Recording what an untouched vision tower computes, for methods that choose tokens behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.attention import AttentionCall
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import ImageView, TowerRecord, TowerSignal
from vislm.lmm.state import SessionState


class TowerRecorder:
    """Takes the signals that prompt stages ask for while the images are encoded, and deals them out by image."""

    def __init__(self, shared: SessionState, wanted: Mapping[str, TowerSignal]) -> None:
        self.shared, self.wanted = shared, wanted
        self._signals: dict[str, list[Tensor]] = {}
        self._features: list[Tensor] = []
        self._pixels: list[Tensor] = []

    def install(self, hooks: Hooks) -> None:
        """Add the hooks and watch the attention of the layers whose signals are needed."""
        adapter = self.shared.adapter
        hooks.before(adapter.tower, self._start)
        if adapter.has_token_features:
            hooks.after(adapter.tower_layers[adapter.read_layer], self._read)
        by_layer: dict[int, list[str]] = {}
        for name, signal in self.wanted.items():
            by_layer.setdefault(signal.layer, []).append(name)
        for layer, names in by_layer.items():
            hooks.watch(adapter.tower_attentions[layer], lambda call, out, n=tuple(names): self._take(call, out, n))

    def show(self, view: ImageView, image_of: Tensor) -> None:
        """Complete the view of image number ``view.image`` of image_of (B, S) with what the tower computed for it."""
        arguments, adapter = self.shared.image_arguments, self.shared.adapter
        if arguments is None:
            raise UsageError(
                "images that were encoded before the interventions were attached have no record of the vision tower; "
                "pass pixel_values inside the context"
            )
        crops = adapter.crops(arguments)
        image = _encoded_image(view, image_of, len(crops))
        first = sum(crops[:image])
        own = slice(first, first + crops[image])
        view.tower = TowerRecord(
            {name: _deal(parts, image, own, len(crops)) for name, parts in self._signals.items()},
            torch.cat(self._features)[own] if self._features else None,
            torch.cat(self._pixels)[own] if self._pixels and self._pixels[0].dim() == 4 else None,
        )
        if adapter.has_token_features:
            view.project = adapter.project

        def pack(maps: Tensor, newline: float) -> Tensor:
            return adapter.pack(maps, arguments, image, newline)

        view.pack = pack

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._signals = {name: [] for name in self.wanted}
        self._features.clear()
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        self._pixels = [] if pixels is None else [pixels]

    def _take(self, call: AttentionCall, out: Tensor, names: tuple[str, ...]) -> Tensor:
        for name in names:
            self._signals[name].append(self.wanted[name].signal(call))
        return out

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._features.append(output[0] if isinstance(output, tuple) else output)


def _encoded_image(view: ImageView, image_of: Tensor, encoded: int) -> int:
    """Return the number of an image among those that the tower has ``encoded``: beams repeat a sample's images."""
    beams = (int(image_of.max()) + 1) // encoded
    numbers = [row[row >= 0].unique().tolist() for row in image_of]
    before = sum(len(row) for row in numbers[: view.sample // beams * beams : beams])
    return before + numbers[view.sample].index(view.image)


def _deal(parts: list[Tensor], image: int, own: slice, images: int) -> Tensor:
    """Return one image's share: a tower is called once for all crops, or once per image (packed towers)."""
    if len(parts) == 1:
        return parts[0][own]
    if len(parts) == images:
        return parts[image]
    return torch.cat(parts)[own]
