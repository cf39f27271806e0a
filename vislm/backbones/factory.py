"""From a name or a configuration to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from vislm.backbones.config import BackboneConfig, HaloNetConfig, HierarchicalConfig, ViTConfig
from vislm.backbones.halonet import HaloNet
from vislm.backbones.hierarchical import Hierarchical
from vislm.backbones.variants import variant
from vislm.backbones.vit import ViT
from vislm.backbones.weights import load_file

Model = Hierarchical | HaloNet | ViT
"""Every kind of model."""


@overload
def build(config: HierarchicalConfig) -> Hierarchical: ...


@overload
def build(config: HaloNetConfig) -> HaloNet: ...


@overload
def build(config: ViTConfig) -> ViT: ...


def build(config: BackboneConfig) -> Model:
    """Return a model of random weights.

    Raises:
        UnknownName: a component or option that does not exist; names the nearest ones.
        UsageError: sizes that do not fit.
    """
    if isinstance(config, ViTConfig):
        return ViT(config)
    return Hierarchical(config) if isinstance(config, HierarchicalConfig) else HaloNet(config)


def create_model(name: str, *, weights: str | Path | None = None, **overrides: Any) -> Model:
    """Return a published variant, in training mode.

    Args:
        name: one of :func:`list_models`, or the path of a YAML file of the same form.
        weights: a safetensors file of this model's own state dict; None = random weights.
        overrides: fields of the configuration, such as ``num_classes=10``; options of a component are changed by a
            mapping: ``mixer={"small_input": "raise"}``.

    Raises:
        UnknownName: an unknown name, field or option; names the nearest ones.
        CheckpointError: weights that do not fit.
    """
    model = build(variant(name).configured(**overrides))
    if weights is not None:
        load_file(model, Path(weights))
    return model
