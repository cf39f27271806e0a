"""Large-kernel attention: the gate, and the kernel that makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import gelu

from vislm.attention.large_kernel import LargeKernelGate
from vislm.attention.tokens import to_map
from vislm.errors import UsageError
from vislm.report.attention_views.panel import Layer, Panel, array


def gate_map(layer: Layer) -> np.ndarray:
    """Return the gate's root mean square over the channels, ``(h, w)``."""
    attention = layer.attention
    gate: LargeKernelGate = attention.spatial_gating_unit
    x = to_map(gelu(attention.proj_1(layer.x[:, layer.num_prefix :])), layer.grid)
    made = gate.conv1(gate.conv_spatial(gate.conv0(x)))
    return np.sqrt(array(made[0].square().mean(dim=0)))


def gate_kernel(layer: Layer, place: tuple[int, int]) -> np.ndarray:
    """Return the norm of the derivative of a patch's gate by each patch, ``(h, w)``; NaN outside the kernel.

    The gate is linear in what it is made of, so the derivative is its effective kernel, the same for every image:
    ``(sum_c |W_c|^2 k_c^2)^(1/2)`` with the depthwise kernels ``k`` composed and the columns ``W_c`` of the 1x1
    convolution.
    """
    gate: LargeKernelGate = layer.attention.spatial_gating_unit
    with torch.enable_grad():
        x = layer.x.new_zeros(1, gate.conv0.in_channels, *layer.grid, requires_grad=True)
        (kernel,) = torch.autograd.grad(gate.conv_spatial(gate.conv0(x))[0, :, place[0], place[1]].sum(), x)
    column = gate.conv1.weight[:, :, 0, 0].square().sum(dim=0)
    norm = np.sqrt(array((kernel[0].square() * column[:, None, None]).sum(dim=0)))
    return np.where(gate_field(layer, place), norm, np.nan)


def gate_field(layer: Layer, place: tuple[int, int]) -> np.ndarray:
    """Return which patches the gate of a patch depends on, ``(h, w)`` bool: the kernel's rectangle."""
    gate: LargeKernelGate = layer.attention.spatial_gating_unit
    reach = gate.conv0.kernel_size[0] // 2 + gate.conv_spatial.kernel_size[0] // 2 * gate.conv_spatial.dilation[0]
    row, column = (np.abs(np.arange(side) - at) <= reach for side, at in zip(layer.grid, place, strict=True))
    return row[:, None] & column


def gate_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``large_kernel`` attention.

    Raises:
        UsageError: heads, which it has none of.
    """
    if heads:
        raise UsageError(f"heads={tuple(heads)}: large-kernel attention has no heads; leave them out")
    gate, field, kernel = layer.attention.spatial_gating_unit, gate_field(layer, place), gate_kernel(layer, place)
    near, far = gate.conv0.kernel_size[0], gate.conv_spatial.kernel_size[0]
    side = near + (far - 1) * gate.conv_spatial.dilation[0]
    return [
        Panel("what the model sees", f"the gate sees {side} x {side} patches", frame=field),
        Panel(
            "effective kernel",
            "strength of each patch in the query's gate",
            100 * kernel / np.nanmax(kernel),
            "% of the largest",
            frame=field,
        ),
        Panel("gate", "what each patch is multiplied by", gate_map(layer), "root mean square"),
    ]
