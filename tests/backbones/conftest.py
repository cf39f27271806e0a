"""Small versions of every variant: the same parts, fewer and narrower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vislm.backbones import HierarchicalConfig, ViTConfig, build, variant
from vislm.backbones.backbone import Backbone


@pytest.fixture(scope="session")
def small() -> Callable[[str], Backbone]:
    """Return the function that builds a small version by its name."""
    return _small


KEPT_HEADS = ("moh_vit", "sg_former")
"""Families whose options say what single heads do."""


def _small(name: str) -> Backbone:
    """Return a variant with each stage's first blocks only, 4 channels a head and 5 classes, randomly weighted."""
    config = variant(name).config
    if isinstance(config, HierarchicalConfig):
        stages = [
            replace(stage, dim=max(8 * 2**index, 4 * heads), num_heads=heads, depth=min(stage.depth, len(stage.blocks)))
            for index, stage in enumerate(config.stages)
            for heads in (stage.num_heads if name.startswith(KEPT_HEADS) else 2**index,)
        ]
        return build(replace(config, stages=tuple(stages), num_classes=5, drop_path_rate=0.0))
    if isinstance(config, ViTConfig):
        depth = min(config.depth, len(config.blocks))
        return build(replace(config, dim=8, num_heads=2, depth=depth, num_classes=5, drop_path_rate=0.0))
    ratios = [
        (stage.dim / stage.mid_dim, (stage.value_dim or stage.mid_dim) / stage.mid_dim) for stage in config.stages
    ]
    stages = [
        replace(stage, dim=int(16 * wide), mid_dim=16, value_dim=int(16 * values), depth=1, num_heads=2)
        for stage, (wide, values) in zip(config.stages, ratios, strict=True)
    ]
    final = None if config.final_dim is None else 24
    return build(replace(config, stages=tuple(stages), stem_dim=8, final_dim=final, num_classes=5))
