"""Feature pyramids for dense prediction: torchvision's detectors, and segmentation heads of the UPerNet kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor, nn

from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.backbone import Backbone
from vislm.backbones.config import HierarchicalConfig
from vislm.backbones.finals import IdentityFinal
from vislm.errors import UsageError


class FeaturePyramid(nn.Module):
    """The maps of several levels of a backbone, fine to coarse, each behind a LayerNorm of its own.

    The head, the final norm and the levels behind the last one wanted are removed from the backbone, so that gradients
    reach every parameter. Images of any size; sides are divided by each level's reduction and rounded up.

    Args:
        model: of :func:`vislm.create_model`; it is changed.
        levels: which of ``model.feature_info``, counted from 0; None = the last level of each resolution.
        norm: put a LayerNorm over the channels behind each level, as detectors and segmentation models on such
            backbones do; the levels of a backbone end without one.

    Attributes:
        channels: width of each level.
        reductions: pixels per token of each level.

    Raises:
        UsageError: levels that are not there, or of which one is not coarser than the one before.
    """

    def __init__(self, model: Backbone, levels: Sequence[int] | None = None, *, norm: bool = True) -> None:
        super().__init__()
        reductions = [info["reduction"] for info in model.feature_info]
        last_of_each = sorted({reduction: level for level, reduction in enumerate(reductions)}.values())
        chosen = tuple(last_of_each if levels is None else levels)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(reductions):
            raise UsageError(f"{levels=}, expected some of 0 to {len(reductions) - 1}")
        self.levels, self.reductions = chosen, tuple(reductions[level] for level in chosen)
        if list(self.reductions) != sorted(set(self.reductions)):
            raise UsageError(f"{levels=} have {self.reductions} pixels per token, expected each coarser than the last")
        self.channels = tuple(model.feature_info[level]["num_chs"] for level in chosen)
        model.prune_intermediate_layers(chosen)
        if isinstance(model.config, HierarchicalConfig):
            model.add_module("norm", IdentityFinal(model.config))
        else:
            setattr(model, "final_conv" if hasattr(model, "final_conv") else "norm", nn.Identity())
        self.body = model
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for width in self.channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels as ``"0", "1", ..``: maps ``(B, C_i, H_i, W_i)`` of images ``(B, 3, H, W)``."""
        found = self.body.forward_intermediates(images, self.levels, stop_early=True, intermediates_only=True)
        maps = cast("list[Tensor]", found)  # the maps alone
        normed = (to_map(norm(to_tokens(x)), x.shape[2:]) for norm, x in zip(self.norms, maps, strict=True))
        return OrderedDict((str(place), x) for place, x in enumerate(normed))


class DetectionBackbone(nn.Module):
    """A feature pyramid behind torchvision's top-down network: what its detectors take as ``backbone=``.

    ``MaskRCNN(DetectionBackbone(pyramid), num_classes=91)``, or ``RetinaNet(DetectionBackbone(pyramid, extra="p6p7"),
    num_classes=91)`` with a pyramid of the levels 1 to 3 and anchors of your choice.

    Args:
        pyramid: its levels.
        out_channels: width of all maps.
        extra: coarser maps on top: ``"pool"`` = one, every second token of the last (Faster and Mask R-CNN), ``"p6p7"``
            = two convolutions of stride 2 (RetinaNet), None.

    Raises:
        UsageError: an unknown ``extra``.
    """

    def __init__(
        self, pyramid: FeaturePyramid, out_channels: int = 256, *, extra: Literal["pool", "p6p7"] | None = "pool"
    ) -> None:
        from torchvision.ops import feature_pyramid_network as fpn

        super().__init__()
        if extra not in (None, "pool", "p6p7"):
            raise UsageError(f"{extra=}, expected 'pool', 'p6p7' or None")
        blocks = {"pool": fpn.LastLevelMaxPool, "p6p7": lambda: fpn.LastLevelP6P7(out_channels, out_channels)}
        top = None if extra is None else blocks[extra]()
        self.body, self.out_channels = pyramid, out_channels
        self.fpn = fpn.FeaturePyramidNetwork(list(pyramid.channels), out_channels, top)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps ``(B, out_channels, H_i, W_i)`` by their names, fine to coarse."""
        maps: dict[str, Tensor] = self.fpn(self.body(images))
        return OrderedDict(maps)
