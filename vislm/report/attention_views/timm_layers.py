"""timm's own window and halo attentions as ours, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vislm.attention.halo import HaloAttention
from vislm.attention.tokens import to_tokens
from vislm.attention.window import WindowAttention
from vislm.errors import UsageError
from vislm.report.attention_views.panel import Layer

Listening = tuple[nn.Module, Callable[[nn.Module, tuple[Any, ...], Any], Layer]]


def swin_layer(model: nn.Module, path: str) -> Listening:
    """Return what to hear of a Swin block, the norm in front of its attention, and the layer that this makes."""
    block: Any = model.get_submodule(path.rpartition(".")[0])
    theirs = block.attn
    wanted = tuple(size // 2 for size in block.window_size)
    shifted = any(block.shift_size)
    if theirs.qkv.in_features != theirs.proj.in_features or (shifted and not _shifts_by(block, wanted)):
        raise UsageError(f"{path} has heads or shifts of another size than Swin's, of which there is no picture")
    ours = WindowAttention(
        theirs.dim, theirs.num_heads, block.window_size, shifted=shifted, qkv_bias=theirs.qkv.bias is not None
    )
    ours.load_state_dict(theirs.state_dict())

    def layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Layer:
        _, height, width, _ = output.shape
        return Layer(ours.to(output).eval(), output[:1].flatten(1, 2), (height, width))

    return block.norm1, layer


def halo_layer(model: nn.Module, path: str) -> Listening:
    """Return what to hear of a HaloNet block, its attention, and the layer that this makes."""
    theirs: Any = model.get_submodule(path)
    ours = HaloAttention(
        theirs.q.in_channels,
        theirs.dim_out_v,
        stride=theirs.block_stride,
        num_heads=theirs.num_heads,
        dim_head=theirs.dim_head_qk,
        block_size=theirs.block_size,
        halo_size=theirs.halo_size,
        qkv_bias=theirs.q.bias is not None,
        scale_pos_embed=theirs.scale_pos_embed,
    )
    ours.load_state_dict(theirs.state_dict())

    def layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Layer:
        x: Tensor = args[0][:1]
        return Layer(ours.to(x).eval(), to_tokens(x), (x.shape[2], x.shape[3]))

    return theirs, layer


TIMM_LAYERS: dict[str, Callable[[nn.Module, str], Listening]] = {
    "timm.models.swin_transformer.WindowAttention": swin_layer,
    "timm.layers.halo_attn.HaloAttn": halo_layer,
}
"""Full name of an attention's class -> what to hear of it."""


def _shifts_by(block: Any, half: tuple[int, ...]) -> bool:
    """Return whether a block's windows are shifted by half, but along axes that are one window."""
    sides = zip(block.shift_size, half, block.window_size, block.input_resolution, strict=True)
    return all(shift == (expected if window < side else 0) for shift, expected, window, side in sides)
