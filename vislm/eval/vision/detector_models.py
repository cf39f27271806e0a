"""Detectors by name: torchvision's own, and its Faster R-CNN, Mask R-CNN and RetinaNet on backbones of vislm or timm.

Sources: Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870; Lin et al., arXiv 1708.02002; torchvision.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from vislm.backbones import create_model, list_models
from vislm.backbones.pyramid import DetectionBackbone, FeaturePyramid
from vislm.backbones.weights import load_file, load_state
from vislm.errors import CheckpointError, UnknownName, UsageError
from vislm.eval.vision.model_spec import RANDOM, ModelSpec

OPTIONS: dict[str, Any] = {
    "backbone": str,
    "num_classes": int,
    "min_size": int,
    "max_size": int,
    "score_thresh": float,
    "mean": tuple[float, ...],
    "std": tuple[float, ...],
    "bn_eps": float,
    "labels": str,
}
"""Model option -> type."""
HEADS = ("fasterrcnn", "maskrcnn", "retinanet")
"""Detectors that take ``backbone=``."""
LIBRARY_WEIGHTS = "COCO_V1"
COCO_CLASSES = 91
"""torchvision's count: background and COCO's ids 1 to 90."""


def build(spec: ModelSpec) -> nn.Module:
    """Return a detector in evaluation mode with its weights.

    Args:
        spec: ``maskrcnn_resnet50_fpn@FILE.safetensors`` (a state dict by torchvision's names),
            ``maskrcnn_resnet50_fpn@COCO_V1`` (may download), ``maskrcnn@FILE.safetensors:backbone=nat_tiny``.
            num_classes counts the background (default 91); min_size and max_size bound the sides of the resized
            picture; bn_eps replaces the epsilon of batch normalisation (torchvision's COCO_V1 weights want 0.0, which
            is the default for ``@COCO_V1``).

    Raises:
        UnknownName: no such detector, backbone or weights.
        UsageError: a backbone for a detector that has one, or none for one that needs it.
        CheckpointError: weights that do not fit or cannot be had.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = _on_backbone(spec) if spec.name in HEADS else _library_model(spec)
    eps = spec.options.get("bn_eps")
    if spec.file is not None:
        load_file(model, spec.file)
    elif spec.weights != RANDOM:
        load_state(model, _published(spec), spec.weights)
        eps = 0.0 if eps is None and spec.weights == LIBRARY_WEIGHTS else eps
    if eps is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
    return model.eval().requires_grad_(False)


def detector_names() -> list[str]:
    """Return torchvision's box and mask detectors, and those that take a backbone."""
    from torchvision import models

    names = models.list_models(module=models.detection)
    return sorted([*(n for n in names if not n.startswith("keypoint")), *HEADS])


def _library_model(spec: ModelSpec) -> nn.Module:
    from torchvision import models

    if spec.name not in detector_names():
        raise UnknownName("detector", spec.name, detector_names())
    if "backbone" in spec.options:
        raise UsageError(f"{spec.name} has a backbone; backbone= goes with {', '.join(HEADS)}")
    options = _settings(spec, single_stage=spec.name.partition("_")[0] in ("retinanet", "fcos", "ssd300", "ssdlite320"))
    if spec.name.startswith("ssd"):  # of one input size
        for key in ("min_size", "max_size"):
            if options.pop(key, None) is not None:
                raise UsageError(f"{spec.name} resizes pictures to its own size; leave {key} out")
    return models.get_model(spec.name, weights=None, weights_backbone=None, num_classes=_classes(spec), **options)


def _on_backbone(spec: ModelSpec) -> nn.Module:
    from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

    if "backbone" not in spec.options:
        raise UsageError(f"{spec.name} needs a backbone of vislm or timm: {spec.name}@WEIGHTS:backbone=nat_tiny")
    single = spec.name == "retinanet"
    pyramid = _pyramid(spec.options["backbone"], levels=3 if single else 4)
    settings = _settings(spec, single)
    if single:
        body = DetectionBackbone(pyramid, extra="p6p7")
        return RetinaNet(body, _classes(spec), anchor_generator=_anchors(), **settings)
    kind = MaskRCNN if spec.name == "maskrcnn" else FasterRCNN
    return kind(DetectionBackbone(pyramid), _classes(spec), **settings)


def _anchors() -> nn.Module:
    """Return RetinaNet's anchors for five levels: three sizes an octave, three shapes."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def _classes(spec: ModelSpec) -> int:
    return spec.options.get("num_classes", COCO_CLASSES)


def _settings(spec: ModelSpec, single_stage: bool) -> dict[str, Any]:
    """Return what the options mean to torchvision's constructors."""
    names = {"min_size": "min_size", "max_size": "max_size", "mean": "image_mean", "std": "image_std"}
    names["score_thresh"] = "score_thresh" if single_stage else "box_score_thresh"
    return {names[key]: value for key, value in spec.options.items() if key in names}


def _pyramid(name: str, levels: int) -> FeaturePyramid:
    """Return the coarsest ``levels`` maps of a backbone, of which the last has 32 pixels a token.

    Raises:
        UnknownName: neither vislm nor timm knows it.
        UsageError: it gives other maps.
    """
    import timm

    if name in list_models():
        model = cast("Any", create_model(name, num_classes=0))
        last_of_each = {info["reduction"]: level for level, info in enumerate(model.feature_info)}
        _check_reductions(name, tuple(last_of_each)[-levels:], levels)
        return FeaturePyramid(model, tuple(last_of_each.values())[-levels:])
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*list_models(), *timm.list_models()], 9)
        raise UnknownName("backbone", name, near)
    pyramid = TimmPyramid(name, levels)
    _check_reductions(name, pyramid.reductions, levels)
    return cast("FeaturePyramid", pyramid)


def _check_reductions(name: str, found: tuple[int, ...], levels: int) -> None:
    expected = (4, 8, 16, 32)[-levels:]
    if found != expected:
        raise UsageError(f"{name} gives maps of {found} pixels a token; a detector needs {expected}")


class TimmPyramid(nn.Module):
    """The coarsest maps of one of timm's backbones, as a detector takes them.

    Attributes:
        channels: width of each level.
        reductions: pixels per token of each level.

    Raises:
        UsageError: the backbone gives no maps, or only for pictures of one size.
    """

    def __init__(self, name: str, levels: int) -> None:
        super().__init__()
        model = _timm_features(name)
        self.body = model
        self.channels = tuple(model.feature_info.channels()[-levels:])
        self.reductions = tuple(model.feature_info.reduction()[-levels:])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels as ``"0", "1", ..``: maps ``(B, C_i, H_i, W_i)`` of images ``(B, 3, H, W)``."""
        maps = self.body(images)[-len(self.channels) :]
        return OrderedDict(
            (str(place), x if x.shape[1] == width else x.permute(0, 3, 1, 2))  # Swin's are channels last
            for place, (x, width) in enumerate(zip(maps, self.channels, strict=True))
        )


def _timm_features(name: str) -> Any:
    import timm

    try:
        try:
            model = timm.create_model(name, features_only=True, pretrained=False, strict_img_size=False)
        except TypeError:  # only some window models have a fixed size to be freed from
            model = timm.create_model(name, features_only=True, pretrained=False)
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, 64, 96))
    except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
        raise UsageError(f"timm's {name} gives no feature maps of pictures of any size: {error}") from error
    return model


def _published(spec: ModelSpec) -> dict[str, Tensor]:
    from torchvision import models

    if spec.name in HEADS:
        raise UsageError(f"{spec.name} on {spec.options['backbone']} has no published weights; name a file")
    known = models.get_model_weights(spec.name).__members__
    if spec.weights not in known:
        raise UnknownName(f"weights of {spec.name}", spec.weights, known, "Weights of your own: a .safetensors file.")
    try:
        return known[spec.weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"torchvision's {spec.weights} of {spec.name} cannot be had: {error}") from error
