"""Stopping a forward pass at one attention, to look at what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vislm.attention import attention_class
from vislm.backbones.replacing import AttentionSite, attention_of, replace_attention
from vislm.backbones.replacing_host import ReplacedAttention
from vislm.errors import UsageError
from vislm.report.attention_views.panel import Layer
from vislm.report.attention_views.timm_layers import TIMM_LAYERS
from vislm.report.attention_views.views import VIEWS

_Seen = TypeVar("_Seen")


def find_layer(model: nn.Module, stage: int | None = None, block: int | None = None) -> AttentionSite:
    """Return the first attention of a stage and block, as the numbers in the modules' names count.

    Args:
        model: of ``vislm`` or timm.
        stage: negative from the end; None = the first.
        block: of that stage, or of a model without stages; negative from the end; None = the first.

    Raises:
        UsageError: no such layer; lists those that there are.
    """
    sites = attention_of(model)
    if not sites:
        raise UsageError(f"{type(model).__name__} has no attention to draw")
    staged = any(len(_numbers(site)) > 1 for site in sites)
    if stage is not None and not staged:
        raise UsageError(f"stage={stage}: {type(model).__name__} has no stages; give the block alone")
    if staged:
        sites = _chosen("stage", stage, sites, [_numbers(site)[0] if _numbers(site) else -1 for site in sites])
    return _chosen("block", block, sites, [(_numbers(site) or [-1])[-1] for site in sites])[0]


def at_layer(model: nn.Module, images: Tensor, site: AttentionSite, look: Callable[[Layer], _Seen]) -> _Seen:
    """Run a model up to an attention and return what ``look`` says of it; the rest is not computed.

    ``look`` is called inside the forward pass, where rotary positions are known. Plain attentions of timm are turned
    into ``dense``, its window and halo attentions into ours, with the same weights.

    Args:
        model: in evaluation mode.
        images: ``(1, 3, H, W)``.
        site: from :func:`find_layer` or ``vislm.attention_of``.
        look: is given the layer.

    Raises:
        UsageError: an attention without a picture.
    """
    found = list[_Seen]()
    with ExitStack() as stack, torch.no_grad():
        if site.attention == "softmax":
            number = _plain(model, site)
            stack.callback(replace_attention(model, "dense", layers=(number, number)).undo)
        module, layer_of = _listening(model, site)

        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            handle.remove()  # looking may call the module again
            found.append(look(layer_of(module, args, output)))
            raise _Stop

        handle = module.register_forward_hook(hook)
        stack.callback(handle.remove)
        try:
            model(images)
        except _Stop:
            return found[0]
    raise UsageError(f"{site.path} takes no part in the model's forward pass")


class _Stop(Exception):
    """The layer was seen."""


def _listening(model: nn.Module, site: AttentionSite) -> tuple[nn.Module, Callable[..., Layer]]:
    """Return the module whose call is heard, and what makes a :class:`Layer` of module, arguments and output."""
    module = model.get_submodule(site.path)
    if isinstance(module, ReplacedAttention):
        return module.mixer, _own
    if any(type(module) is attention_class(name) for name in VIEWS):
        return module, _own
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in TIMM_LAYERS:
        raise UsageError(
            f"{site.path} is a {kind}, which has no picture; vislm's {', '.join(VIEWS)} and timm's "
            f"{', '.join(TIMM_LAYERS)} and plain attentions have one"
        )
    return TIMM_LAYERS[kind](model, site.path)


def _own(module: nn.Module, args: tuple[Any, ...], output: object) -> Layer:
    x, grid, *given = args
    significance = given[0] if given and isinstance(given[0], Tensor) else None
    return Layer(module, x[:1], (int(grid[0]), int(grid[1])), None if significance is None else significance[:1])


def _plain(model: nn.Module, site: AttentionSite) -> int:
    """Return the number of the block of a plain attention; raise ``UsageError`` where position biases are added."""
    if hasattr(model.get_submodule(site.path), "relative_position_bias_table"):
        raise UsageError(f"{site.path} adds its own biases of relative position, of which there is no picture")
    return _numbers(site)[-1]


def _numbers(site: AttentionSite) -> list[int]:
    return [int(part) for part in site.path.split(".") if part.isdigit()]


def _chosen(
    what: str, number: int | None, sites: Sequence[AttentionSite], numbers: Sequence[int]
) -> list[AttentionSite]:
    """Return the sites whose number is the one wanted."""
    there = sorted(set(numbers))
    wanted = there[0] if number is None else there[number] if -len(there) <= number < 0 else number
    if wanted not in there:
        layers = ", ".join(f"{site.path} ({site.attention})" for site in sites[:_SHOWN])
        more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
        raise UsageError(f"{what}={number}, expected one of {', '.join(map(str, there))}; there are {layers}{more}")
    return [site for site, own in zip(sites, numbers, strict=True) if own == wanted]


_SHOWN = 8
"""Layers named in an error."""
