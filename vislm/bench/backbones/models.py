"""Which of timm's models each backbone is compared with, and how both are built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from vislm.backbones import create_model, list_models, variant
from vislm.errors import UnknownName, UsageError

DEIT_S, SWIN_T, PVT_B2 = "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b2"
PEERS: dict[str, tuple[str, ...]] = {
    "nat_tiny": (SWIN_T, DEIT_S),
    "dinat_s_tiny": (SWIN_T,),
    "agent_swin_tiny": (SWIN_T, DEIT_S),
    "nat_mini": (PVT_B2,),
    "agent_pvt_small": (PVT_B2,),
    "stvit_small": (PVT_B2, DEIT_S),
    "sg_former_small": (PVT_B2,),
    "van_b2": (PVT_B2, "convnext_tiny"),
    "agent_deit_small": (DEIT_S,),
    "agent_deit_tiny": ("deit_tiny_patch16_224",),
    "moh_vit_small_75": ("swin_small_patch4_window7_224",),
    "halonet_h4": ("halonet50ts",),
}
"""Ours -> timm's models of about as many parameters; DeiT-S also beside those that have to beat it at 896 pixels."""
STEPS = {"halonet50ts": 256}
"""Peers that take only multiples of so many pixels; the other sizes are rounded up, for both models."""
FIXED_SIZE = ("vit_", "deit_", "deit3_", "swin_", "swinv2_")
"""timm's models that are built for one size of images."""


@dataclass(frozen=True)
class Model:
    """A model by its name."""

    name: str
    library: Literal["vislm", "timm"] = "vislm"

    @property
    def key(self) -> str:
        """A name that tells ours from one of timm's."""
        return f"{self.library}/{self.name}"

    @property
    def short_name(self) -> str:
        """The name without patch, window and image size."""
        return re.sub(r"_patch\d+|_window\d+|_\d{3}$", "", self.name)

    def build(self, size: int) -> nn.Module:
        """Return the model with random weights for square images of ``size`` pixels."""
        if self.library == "vislm":
            return create_model(self.name)
        import timm

        if self.name.startswith(FIXED_SIZE):
            return timm.create_model(self.name, img_size=size)
        return timm.create_model(self.name)


@dataclass(frozen=True)
class Pair:
    """Ours and the peer that it is compared with."""

    ours: Model
    peer: Model

    def size(self, wanted: int) -> int:
        """Return the size of the images that both take: ``wanted``, or the next larger one."""
        step = STEPS.get(self.peer.name, 1)
        return math.ceil(wanted / step) * step


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """Return the pairs of names such as ``nat_tiny`` (its usual peers) or ``nat_tiny:resnet50``.

    Raises:
        UnknownName: no such backbone or no such model in timm; names the nearest ones.
        UsageError: a backbone without a usual peer, or no names.
    """
    pairs = [pair for name in names for pair in _pairs_of(name.strip())]
    if not pairs:
        raise UsageError("no models to measure; give names such as nat_tiny or nat_tiny:resnet50")
    return pairs


def growth_is_linear(name: str) -> bool:
    """Return whether the work of a backbone grows with the pixels: nowhere do all tokens, or all pooled ones, attend.

    Agents are few whatever the number of pixels; super tokens are not, nor is a map pooled by a fixed ratio.
    """
    return name.startswith(("nat_", "dinat_", "agent_", "halonet_", "van_")) and name != "agent_deit_base"


def _pairs_of(text: str) -> list[Pair]:
    import timm

    name, _, peer = text.partition(":")
    if name not in list_models():
        variant(name)  # a path, or an error that names the nearest ones
    if not peer and name not in PEERS:
        raise UsageError(f"{name} has no usual peer among timm's models; name one: {name}:resnet50")
    peers = (peer,) if peer else PEERS[name]
    for other in peers:
        if not timm.is_model(other):
            raise UnknownName("timm model", other, timm.list_models())
    return [Pair(Model(name), Model(other, "timm")) for other in peers]
