"""The view of every attention that has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vislm.attention import attention_class
from vislm.errors import UsageError
from vislm.report.attention_views.agents import agent_panels
from vislm.report.attention_views.dense import dense_panels, lepe_panels, sigmoid_panels
from vislm.report.attention_views.gate import gate_panels
from vislm.report.attention_views.halo import halo_panels
from vislm.report.attention_views.merged_tokens import merged_panels
from vislm.report.attention_views.neighborhood import neighborhood_panels
from vislm.report.attention_views.panel import Layer, Panel
from vislm.report.attention_views.routed_heads import aggregated_panels, cosine_panels, moh_panels
from vislm.report.attention_views.significance import hybrid_panels
from vislm.report.attention_views.stripes import stripe_panels
from vislm.report.attention_views.super_tokens import super_token_panels
from vislm.report.attention_views.window import window_panels

View = Callable[[Layer, tuple[int, int], Sequence[int]], list[Panel]]

VIEWS: dict[str, View] = {
    "agent": agent_panels,
    "agent_cswin": agent_panels,
    "cswin": stripe_panels,
    "dense": dense_panels,
    "halo": halo_panels,
    "hybrid_scale": hybrid_panels,
    "large_kernel": gate_panels,
    "lepe": lepe_panels,
    "moh": moh_panels,
    "moh_aggregated": aggregated_panels,
    "moh_cosine": cosine_panels,
    "neighborhood": neighborhood_panels,
    "self_guided": merged_panels,
    "sigmoid": sigmoid_panels,
    "super_token": super_token_panels,
    "window": window_panels,
}
"""Name of an attention -> panels for a layer, a patch (row, column) and heads (none = what tells most)."""


def attention_name(layer: Layer) -> str:
    """Return the name of the layer's attention; raise ``UsageError`` if it has no picture."""
    for name in VIEWS:
        if type(layer.attention) is attention_class(name):
            return name
    raise UsageError(f"{type(layer.attention).__name__} has no picture; those of {', '.join(VIEWS)} have one")


def panels_of(layer: Layer, place: tuple[int, int], heads: Sequence[int] = ()) -> list[Panel]:
    """Return what a patch attends to at a layer.

    Args:
        layer: from :func:`vislm.report.attention_views.at_layer`, or made by hand.
        place: row and column of the patch.
        heads: which heads, counted from 0; none = their mean and whatever else tells most.

    Raises:
        UsageError: a patch outside the grid, a head that there is not, an attention without a picture.
    """
    name, (height, width) = attention_name(layer), layer.grid
    if not (0 <= place[0] < height and 0 <= place[1] < width):
        raise UsageError(
            f"query {place[0]},{place[1]} is not on the grid of {height} x {width} patches; rows count from 0 to "
            f"{height - 1}, columns from 0 to {width - 1}"
        )
    return VIEWS[name](layer, place, heads)
