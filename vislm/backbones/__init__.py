"""Vision backbones assembled from attention modules, one YAML file per published variant."""

from __future__ import annotations

from vislm.backbones.config import HaloNetConfig, HaloStageConfig, HierarchicalConfig, StageConfig, ViTConfig
from vislm.backbones.factory import build, create_model
from vislm.backbones.official import from_official
from vislm.backbones.timm_names import register_timm
from vislm.backbones.variants import Published, Variant, list_models, variant

__all__ = [
    "HaloNetConfig",
    "HaloStageConfig",
    "HierarchicalConfig",
    "Published",
    "StageConfig",
    "Variant",
    "ViTConfig",
    "build",
    "create_model",
    "from_official",
    "list_models",
    "register_timm",
    "variant",
]
