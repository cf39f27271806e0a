"""Feature pyramids under torchvision's detectors and a segmentation head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from vislm.backbones import list_models, variant
from vislm.backbones.pyramid import DetectionBackbone, FeaturePyramid
from vislm.errors import UsageError

detection = pytest.importorskip("torchvision.models.detection")
pytestmark = pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")

FAMILIES = {variant(name).path.parent.name: name for name in reversed(list_models())}


class UPerHead(nn.Module):
    """Pooled context on the coarsest map, a top-down path, all levels together at the finest resolution."""

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(size) for size in (1, 2, 3, 6))
        self.laterals = nn.ModuleList(nn.Conv2d(entry, width, 1) for entry in channels)
        self.bottleneck = nn.Conv2d(5 * width, width, 3, padding=1)
        self.classify = nn.Conv2d(len(channels) * width, num_classes, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        top = laterals[-1]
        pooled = [interpolate(pool(top), top.shape[2:], mode="bilinear") for pool in self.pools]
        laterals[-1] = self.bottleneck(torch.cat((top, *pooled), dim=1))
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + interpolate(laterals[level], laterals[level - 1].shape[2:])
        fine = [interpolate(x, laterals[0].shape[2:], mode="bilinear") for x in laterals]
        return interpolate(self.classify(torch.cat(fine, dim=1)), size, mode="bilinear")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_gives_maps_of_any_image(small, family) -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid(small(FAMILIES[family]))
    maps = pyramid(torch.randn(2, 3, 50, 83))
    for x, channels, reduction in zip(maps.values(), pyramid.channels, pyramid.reductions, strict=True):
        assert x.shape == (2, channels, math.ceil(50 / reduction), math.ceil(83 / reduction))
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-4, rtol=0)
    head = UPerHead(pyramid.channels, 8, 5)
    logits = head(list(maps.values()), (50, 83))
    assert logits.shape == (2, 5, 50, 83)
    logits.square().sum().backward()
    assert [name for name, parameter in pyramid.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["nat_tiny", "agent_swin_tiny", "van_b0"])
def test_mask_rcnn_learns_and_detects(small, name) -> None:
    torch.manual_seed(0)
    backbone = DetectionBackbone(FeaturePyramid(small(name)), 16)
    model = detection.MaskRCNN(backbone, num_classes=3, min_size=96, max_size=160, rpn_post_nms_top_n_test=20)
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    masks = torch.zeros(1, 90, 151, dtype=torch.uint8)
    masks[:, 10:70, 10:60] = 1
    losses = model([torch.rand(3, 90, 151)], [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}])
    assert set(losses) >= {"loss_mask", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert next(backbone.body.parameters()).grad.abs().sum() > 0
    found = model.eval()([torch.rand(3, 90, 151), torch.rand(3, 77, 64)])
    assert found[0]["masks"].shape[1:] == (1, 90, 151)


@pytest.mark.parametrize("name", ["nat_tiny", "stvit_small", "halonet_h0"])
def test_retina_net(small, name) -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid(small(name), levels=(1, 2, 3))
    assert pyramid.reductions == (8, 16, 32)
    backbone = DetectionBackbone(pyramid, 16, extra="p6p7")
    maps = backbone(torch.randn(1, 3, 100, 167))
    assert [tuple(x.shape[2:]) for x in maps.values()] == [(13, 21), (7, 11), (4, 6), (2, 3), (1, 2)]
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    model = detection.RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=96, max_size=160)
    target = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 90, 151)], [target])
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert len(model.eval()([torch.rand(3, 90, 151)])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_resolution_of_coco(small, family) -> None:
    pyramid = FeaturePyramid(small(FAMILIES[family])).eval()
    with torch.inference_mode():
        maps = pyramid(torch.rand(1, 3, 800, 1333))
    sides = {4: (200, 334), 8: (100, 167), 16: (50, 84), 32: (25, 42)}
    assert [tuple(x.shape[2:]) for x in maps.values()] == [sides[reduction] for reduction in pyramid.reductions]


def test_levels(small) -> None:
    pyramid = FeaturePyramid(small("nat_tiny"), (0, 2), norm=False)
    assert pyramid.channels == (8, 32)
    assert len(pyramid.body.stages) == 3
    assert list(DetectionBackbone(pyramid, 4, extra=None)(torch.randn(1, 3, 64, 64))) == ["0", "1"]
    plain = FeaturePyramid(small("agent_deit_base"))
    assert plain.reductions == (16,)
    assert pyramid.body.macs((64, 64)) > 0


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("nat_tiny", (0, 4), "some of 0 to 3"),
        ("nat_tiny", (), "some of 0 to 3"),
        ("nat_tiny", (-1,), "some of 0 to 3"),
        ("nat_tiny", (2, 1), "each coarser"),
        ("agent_deit_base", (0, 1), "each coarser"),
    ],
)
def test_faulty_levels(small, name, levels, message) -> None:
    with pytest.raises(UsageError, match=message):
        FeaturePyramid(small(name), levels)
    with pytest.raises(UsageError, match="extra='p6'"):
        DetectionBackbone(FeaturePyramid(small("nat_tiny")), extra="p6")
