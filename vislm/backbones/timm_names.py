"""The variants as timm models: ``timm.create_model("nat_tiny")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vislm.backbones.config import HaloNetConfig, ViTConfig
from vislm.backbones.factory import create_model
from vislm.backbones.stems import STEMS
from vislm.backbones.variants import Variant, list_models, variant
from vislm.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_REGISTERED: dict[str, str] = {}


def register_timm() -> dict[str, str]:
    """Register every variant with timm, once, and return our name -> timm's name.

    They are the same, but where timm has a model of that name: then ours is ``vislm_<name>``.
    ``timm.list_models(module="timm_names")`` lists them. Weights come from a file:
    ``timm.create_model("nat_tiny", checkpoint_path="model.safetensors")``. open_clip finds the names too
    (``timm_model_name``). ``img_size`` changes nothing: images of any size fit.
    """
    if not _REGISTERED:
        import timm

        for name in list_models():
            _REGISTERED[name] = f"vislm_{name}" if timm.is_model(name) else name
        for name, registered in _REGISTERED.items():
            default_cfgs[registered] = _preprocessing(variant(name))
            timm.models.register_model(_entry(name, registered))
    return dict(_REGISTERED)


default_cfgs: dict[str, dict[str, Any]] = {}
"""timm's name -> its preprocessing; timm looks here."""


def _preprocessing(entry: Variant) -> dict[str, Any]:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    side = entry.published.input_size
    config, first = entry.config, "stem.conv1.conv"
    if not isinstance(config, HaloNetConfig):
        first = f"stem.{STEMS[config.stem['name']].first_conv}"
    return {
        "input_size": (config.in_chans, side, side),
        "crop_pct": entry.published.crop_pct,
        "interpolation": entry.published.interpolation,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": config.num_classes,
        "first_conv": first,
        "classifier": "head.fc",
    }


def _entry(name: str, registered: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        config = variant(name).config

        def build(**fields: Any) -> nn.Module:
            fields.pop("img_size", None)  # images of any size fit
            if not isinstance(config, ViTConfig) and fields.pop("global_pool", None) not in (None, "avg"):
                raise UsageError(f"{options['global_pool']=}, expected 'avg': {name} averages the tokens")
            return create_model(name, **fields)

        stages = range(len(config.stages))
        features = {"feature_cls": "getter", "out_indices": tuple(stages)}
        return build_model_with_cfg(build, registered, pretrained, feature_cfg=features, **options)

    create.__name__, create.__module__ = registered, __name__
    return create
