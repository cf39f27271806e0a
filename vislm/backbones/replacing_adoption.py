"""How each attention takes over the projections of another one, and how what it adds starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vislm.attention.halo import HaloAttention
from vislm.attention.hybrid_scale import HybridScaleAttention
from vislm.attention.large_kernel import LargeKernelAttention
from vislm.attention.lepe import LepeAttention
from vislm.attention.moh_aggregated import MohAggregatedAttention
from vislm.attention.moh_llama import MohLlamaAttention
from vislm.attention.moh_pooled import PooledGrid
from vislm.attention.self_guided import SelfGuidedAttention
from vislm.attention.super_token import SuperTokenAttention
from vislm.errors import UsageError

Project = Callable[[Tensor], Tensor]
"""From tokens ``(B, N, C)`` to ``[q | k | v]``, ``(B, N, 3 C)``."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "halo": {"mask_padding": True},  # zero keys around the map would take their share of a pretrained softmax
    "large_kernel": {"shortcut": False},
    "moh_llama": {"causal": False, "rope_theta": None},
    "sigmoid": {"bias": "-log_n_current"},
}
"""Options that differ from an attention's own in the place of another one."""

REMARKS = {
    "agent": "agents read and hand on with the model's projections; another computation, to be fine-tuned",
    "agent_cswin": "agents read and hand on with the model's projections; another computation, to be fine-tuned",
    "hybrid_scale": "half of the heads see windows with their own projections, the other half a reduced map",
    "large_kernel": "values and output projection stay; the gate starts at 1; prefix tokens go on attending by q and k",
    "moh_aggregated": "logits are cosines of the model's queries and keys; to be fine-tuned",
    "moh_cosine": "logits are cosines of the model's queries and keys; to be fine-tuned",
    "self_guided": "keys are means of tokens of like significance; to be fine-tuned",
    "sigmoid": "weights are sigmoids of the model's logits; to be fine-tuned",
}
"""What to know of an attention in the place of softmax attention."""


@dataclass(frozen=True)
class Rows:
    """Some rows of the original's ``[q | k | v]``, as an attention's projection gives them.

    Args:
        project: all rows.
        parts: which of ``q``, ``k`` and ``v``, in order.
        half: 0 or 1 for the heads in front or behind, None = all.
        by_head: number of heads to group the rows by, ``[q_0 k_0 v_0 | q_1 ..]``; 0 = ``[q | k | v]``.
    """

    project: Project
    parts: str = "qkv"
    half: int | None = None
    by_head: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``(B, N, C')`` for x ``(B, N, C)``."""
        rows = self.project(x).unflatten(-1, (3, -1))[..., ["qkv".index(part) for part in self.parts], :]
        if self.half is not None:
            rows = rows.chunk(2, dim=-1)[self.half]
        if self.by_head:
            rows = rows.unflatten(-1, (self.by_head, -1)).transpose(-3, -2).flatten(-2)
        return rows.flatten(-2)


def adopt(mixer: nn.Module, attention: str, project: Project) -> None:
    """Let an attention project by a function in place of its own layers, and leave its output projection out.

    Raises:
        UsageError: an attention whose projections the original's do not fit.
    """
    kinds = [kind for kind in ADOPTIONS if isinstance(mixer, kind)]
    if kinds:
        ADOPTIONS[kinds[0]](mixer, project)
    elif hasattr(mixer, "qkv") and hasattr(mixer, "proj"):
        _put(mixer, qkv=Rows(project), proj=nn.Identity())
    else:
        raise UsageError(
            f"{attention} with these options has no joint projection qkv and output projection proj that the weights "
            "of another attention fit"
        )


def start(mixer: nn.Module) -> None:
    """Initialise what an attention adds: as the identity, a mean or zero, so that it disturbs a pretrained model least.

    Tables of positions (which take no weight decay), convolutions of values and routers start at zero.
    """
    tables = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in mixer.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    for name, parameter in mixer.named_parameters():
        if (name in tables or name.endswith(_ZERO)) and not name.endswith(_AS_DRAWN):
            nn.init.zeros_(parameter)
    if isinstance(mixer, HybridScaleAttention):
        _average(mixer.sr)
    elif isinstance(mixer, SelfGuidedAttention):
        for merge in (part for part in mixer.children() if isinstance(part, nn.Linear) and part.out_features == 1):
            nn.init.constant_(merge.weight, 1 / merge.in_features)
            nn.init.zeros_(merge.bias)
    elif isinstance(mixer, MohAggregatedAttention):
        _average(mixer.sr)
    elif isinstance(mixer, LargeKernelAttention):
        gate = mixer.spatial_gating_unit.conv1
        nn.init.zeros_(gate.weight)
        nn.init.ones_(cast(Tensor, gate.bias))


def coarse_grid(mixer: nn.Module, grid: Sequence[int]) -> tuple[int, int] | None:
    """Return the grid of the tokens that an attention averages before it projects them, None if it does not."""
    if isinstance(mixer, HybridScaleAttention):
        return max(grid[0] // mixer.sr_ratio, 1), max(grid[1] // mixer.sr_ratio, 1)
    if isinstance(mixer, MohAggregatedAttention):
        return PooledGrid((grid[0], grid[1]), mixer.sr_ratio).sides
    return mixer.cells(grid)[1] if isinstance(mixer, SuperTokenAttention) else None


_ZERO = (
    *("dwc.weight", "dwc.bias", "height_rel", "width_rel", "wg.weight", "wg_0.weight", "wg_1.weight"),
    *("lepe_linear.weight", "lepe_linear.bias", "lepe_conv.bias", "learnable_tokens"),
)
_AS_DRAWN = ("temperature", "cpb_fc1.weight", "cpb_fc1.bias")
"""The last layer of a network of positions is zero; one in front of it must not be too, or nothing would learn."""


def _average(conv: nn.Conv2d) -> None:
    """Let a convolution return the mean of what it sees."""
    with torch.no_grad():
        places = conv.weight[0, 0].numel()
        conv.weight.copy_(torch.eye(conv.in_channels)[..., None, None] / places)
        nn.init.zeros_(cast(Tensor, conv.bias))


def _put(mixer: nn.Module, **parts: Any) -> None:
    for name, part in parts.items():
        delattr(mixer, name)
        setattr(mixer, name, part)  # a function is no module: its parameters are the host's


def _super_token(mixer: SuperTokenAttention, project: Project) -> None:
    if mixer.stoken_refine is None or mixer.refine != "attention":
        raise UsageError(
            f"super_token with refine={mixer.refine!r} has no joint projection qkv that the weights of another "
            'attention fit; give refine="attention"'
        )
    _put(mixer.stoken_refine, qkv=Rows(project, by_head=mixer.num_heads), proj=nn.Identity())


def _halo(mixer: HaloAttention, project: Project) -> None:
    if mixer.stride != 1 or mixer.dim_out != mixer.dim or mixer.dim_head != mixer.dim_value:
        raise UsageError(
            "halo with stride, dim_out, dim_head or qk_ratio changes sizes that a block of a vision transformer and "
            "its weights have; leave these options out"
        )
    _put(mixer, q=Rows(project, "q"), kv=Rows(project, "kv", by_head=mixer.num_heads))


def _hybrid_scale(mixer: HybridScaleAttention, project: Project) -> None:
    coarse, local = ({"q": Rows(project, "q", half), "kv": Rows(project, "kv", half)} for half in (0, 1))
    _put(mixer, q1=coarse["q"], kv1=coarse["kv"], q2=local["q"], kv2=local["kv"], proj=nn.Identity())


def _self_guided(mixer: SelfGuidedAttention, project: Project) -> None:
    _put(mixer, q=Rows(project, "q"), kv1=Rows(project, "kv", 0), kv2=Rows(project, "kv", 1), proj=nn.Identity())


def _separate(mixer: nn.Module, project: Project) -> None:
    _put(mixer, q=Rows(project, "q"), kv=Rows(project, "kv"), proj=nn.Identity())


def _moh_llama(mixer: MohLlamaAttention, project: Project) -> None:
    query, key, value = (Rows(project, part) for part in "qkv")
    if mixer.num_kv_heads != mixer.num_heads:
        raise UsageError("moh_llama has the model's heads of keys and values here; leave num_kv_heads out")
    _put(mixer, q_proj=query, k_proj=key, v_proj=value, o_proj=nn.Identity())


def _large_kernel(mixer: LargeKernelAttention, project: Project) -> None:
    _put(mixer, proj_1=Rows(project, "v"), proj_2=nn.Identity())


ADOPTIONS: dict[type[nn.Module], Callable[[Any, Project], None]] = {
    SuperTokenAttention: _super_token,
    HaloAttention: _halo,
    HybridScaleAttention: _hybrid_scale,
    SelfGuidedAttention: _self_guided,
    LepeAttention: _separate,
    MohAggregatedAttention: _separate,
    MohLlamaAttention: _moh_llama,
    LargeKernelAttention: _large_kernel,
}
"""Attentions that project by other layers than ``qkv`` and ``proj``."""
