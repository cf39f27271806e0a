"""The published variants: one YAML file each, found by its name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from vislm.backbones.config import BackboneConfig, HaloNetConfig, HierarchicalConfig, ViTConfig
from vislm.backbones.reading import read
from vislm.errors import UnknownName, UsageError

FOLDER = Path(__file__).parent / "configs"
SKELETONS: dict[str, type[BackboneConfig]] = {
    "hierarchical": HierarchicalConfig,
    "halonet": HaloNetConfig,
    "vit": ViTConfig,
}
"""Name of a skeleton -> its fields."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the authors report, not re-measured here.

    Args:
        source: paper and official repository.
        params: exact number of parameters, with 1000 classes.
        gmacs: multiply-adds in 10^9 at ``input_size``, which papers call FLOPs; None = not reported.
        top1: accuracy on ImageNet-1k in percent; None = not reported.
        input_size: side of the images.
        crop_pct: that side as a part of the image's shorter side, when they are cut out in the middle.
        interpolation: how images are resized, ``bicubic`` or ``bilinear``; colours are normalised as for all of
            ImageNet.
    """

    source: str
    params: int
    gmacs: float | None = None
    top1: float | None = None
    input_size: int = 224
    crop_pct: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One file: a model and what is published of it."""

    name: str
    path: Path
    published: Published
    config: BackboneConfig

    def configured(self, **overrides: Any) -> BackboneConfig:
        """Return the configuration with other fields; a mapping changes the options that it names and no others."""
        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        for key, value in overrides.items():
            given = fields.get(key)
            if isinstance(given, dict) and isinstance(value, dict) and "name" not in value:
                value = {**given, **value}
            fields[key] = value
        return read(type(self.config), fields, str(self.path))


@dataclass(frozen=True, kw_only=True)
class _File:
    skeleton: str
    published: Published
    model: dict[str, Any]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all variants that match a pattern such as ``"*nat_tiny*"``."""
    return sorted(name for name in _paths() if fnmatch(name, pattern))


def variant(name: str) -> Variant:
    """Return a variant by its name, or by the path of a YAML file of the same form.

    Raises:
        UnknownName: no such name, skeleton or key; names the nearest ones.
        UsageError: a file that cannot be read, a value of the wrong type.
    """
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else _paths().get(name)
    if path is None:
        raise UnknownName("backbone", name, list_models())
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    file = read(_File, content, str(path))
    if file.skeleton not in SKELETONS:
        raise UnknownName(f"skeleton in {path}", file.skeleton, SKELETONS)
    config = read(SKELETONS[file.skeleton], file.model, f"model in {path}")
    return Variant(name=path.stem, path=path, published=file.published, config=config)


def _paths() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.rglob("*.yaml")}
