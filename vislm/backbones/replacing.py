"""Another attention inside a pretrained vision transformer of timm or open_clip."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import nn

from vislm.attention import attention_class, attention_names
from vislm.attention.hybrid_scale import HybridScaleAttention
from vislm.attention.neighborhood import NeighborhoodAttention
from vislm.attention.self_guided import SelfGuidedAttention
from vislm.backbones.replacing_adoption import DEFAULTS, start
from vislm.backbones.replacing_beit import BeitForm, ReplacedBeit
from vislm.backbones.replacing_forms import FORMS, Form, class_name, form_of
from vislm.backbones.replacing_handle import Replacement
from vislm.backbones.replacing_host import GridOfTokens, ReplacedAttention, ReplacedMultihead, Significance
from vislm.backbones.replacing_towers import Tower, tower_of
from vislm.errors import UnknownName, UsageError

Attention = str | type[nn.Module] | Mapping[str, Any]
"""A name of ``vislm.attention.attention_names()``, a class of your own, or ``{"name": .., option: ..}``."""


def replace_attention(
    model: nn.Module, attention: Attention | Sequence[Attention], layers: tuple[int, int] = (0, -1), **options: Any
) -> Replacement:
    """Put another attention into a vision transformer, in place; its weights stay.

    The projections, norms of queries and keys, rotary positions, gates and class or register tokens remain the
    model's, under the same names in its state dict; the attention's own parameters (such as ``rpb``) are added as
    ``....mixer.*``. They start so that they disturb least: tables of positions, convolutions of values and routers at
    zero, poolings as means. So a window over the whole grid, or a mixture of all heads, gives the original's output.

    Args:
        model: a timm vision transformer (ViT, DeiT, EVA, SigLIP, DINOv2, BEiT ..), the visual tower of an open_clip
            model, or the open_clip model around it.
        attention: its name; or a class of your own that takes ``dim, num_heads``, projects by ``qkv`` and ``proj`` and
            has ``forward(x, grid)``. Several take turns: ``["hybrid_scale", "self_guided"]``, or Swin's
            ``["window", {"name": "window", "shifted": True}]``.
        layers: first and last layer, both included, counted from 0 or from the end.
        options: of the attention (of each, if there are several), such as ``window_size=7``.

    Returns:
        A handle that puts the original back: ``undo()``, or at the end of ``with replace_attention(...):``. Trained
        projections stay trained. It tells what is new and what is without use; ``print`` it.

    Raises:
        UnknownName: an unknown attention or option; names the nearest ones.
        UsageError: a model or an attention whose weights do not fit, or layers that are not there.
    """
    tower, wanted = tower_of(model), [_asked(entry, options) for entry in _several(attention)]
    first, last = (index + len(tower.blocks) if index < 0 else index for index in layers)
    if not 0 <= first <= last < len(tower.blocks):
        raise UsageError(f"{layers=}, expected the first and last of {len(tower.blocks)} layers")
    grid, made = GridOfTokens(), list[tuple[nn.Module, ReplacedAttention]]()
    for index, asked in zip(range(first, last + 1), cycle(wanted)):
        original = tower.attention(index)
        made.append((original, _host(asked, original, f"layer {index}", tower, grid)))
    _relay([host for _, host in made], tower.rotary)
    return Replacement(model, tower, range(first, last + 1), made, grid)


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model.

    Attributes:
        path: name of the module.
        attention: our name of it, ``"softmax"`` for the plain ones of timm, open_clip and PyTorch, and otherwise the
            name of the class.
        options: what ``print(module)`` says of it.
        replaced: whether :func:`replace_attention` put it there.
    """

    path: str
    attention: str
    options: str
    replaced: bool


def attention_of(model: nn.Module) -> list[AttentionSite]:
    """Return which attention is used where, in the order of the layers."""
    ours = {attention_class(name): name for name in attention_names()}
    sites: list[AttentionSite] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{site.path}.") for site in sites):
            continue
        kind = type(module)
        if isinstance(module, ReplacedAttention):
            sites.append(AttentionSite(path, module.attention, module.mixer.extra_repr(), True))
        elif kind in ours:
            sites.append(AttentionSite(path, ours[kind], module.extra_repr(), False))
        elif class_name(module) in FORMS:
            sites.append(AttentionSite(path, "softmax", f"num_heads={module.num_heads}", False))
        elif kind.__name__.endswith(("Attention", "Attn")):
            sites.append(AttentionSite(path, kind.__name__, module.extra_repr(), False))
    return sites


@dataclass(frozen=True)
class _Asked:
    """An attention that was asked for."""

    name: str
    kind: type[nn.Module]
    options: dict[str, Any]


def _several(attention: Attention | Sequence[Attention]) -> Sequence[Attention]:
    if isinstance(attention, (str, type, Mapping)):
        return [attention]
    if not attention:
        raise UsageError(f"{attention=}, expected one attention or more")
    return attention


def _asked(attention: Attention, options: Mapping[str, Any]) -> _Asked:
    """Return what an entry asks for; raise ``UnknownName`` for names and options that do not exist."""
    entry = dict(attention) if isinstance(attention, Mapping) else {"name": attention}
    if "name" not in entry:
        raise UsageError(f"attention is {entry}, expected {{'name': ..., option: value}}")
    kind = attention_class(entry["name"])
    name = entry.pop("name")
    name = kind.__name__ if isinstance(name, type) else name
    given = {**options, **entry}
    known = set(inspect.signature(kind).parameters) - {"dim", "num_heads", "num_prefix_tokens"}
    for option in given:
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
    return _Asked(name, kind, {**DEFAULTS.get(name, {}), **given})


def _host(asked: _Asked, original: nn.Module, path: str, tower: Tower, grid: GridOfTokens) -> ReplacedAttention:
    form = form_of(original, path)
    mixer = _mixer(asked, form, tower)
    weight = next(original.parameters())
    mixer.to(weight.device, weight.dtype)
    if isinstance(original, nn.MultiheadAttention):
        return ReplacedMultihead(original, form, asked.name, mixer, grid)
    if isinstance(form, BeitForm):
        return ReplacedBeit(original, form, asked.name, mixer, grid)
    return ReplacedAttention(original, form, asked.name, mixer, grid)


def _mixer(asked: _Asked, form: Form, tower: Tower) -> nn.Module:
    given = {"num_prefix_tokens": tower.num_prefix_tokens, "attn_drop": form.attn_drop, **asked.options}
    if isinstance(form, BeitForm) and form.window is not None and issubclass(asked.kind, NeighborhoodAttention):
        given = {"rel_pos_bias": True, **given}  # the model's own
    known = inspect.signature(asked.kind).parameters
    if tower.num_prefix_tokens and "num_prefix_tokens" not in known:
        raise UsageError(
            f"{asked.name} has no place for the model's {tower.num_prefix_tokens} class or register tokens: its "
            "__init__ has no num_prefix_tokens"
        )
    sizes: dict[str, Any] = {"dim": form.width, "num_heads": form.num_heads}
    mixer = asked.kind(**sizes, **{name: entry for name, entry in given.items() if name in known})
    start(mixer)
    return mixer


def _relay(hosts: Sequence[ReplacedAttention], rotary: bool) -> None:
    """Give each self-guided attention the map of the hybrid-scale one in the layer before."""
    before: ReplacedAttention | None = None
    for host in hosts:
        if isinstance(host.mixer, SelfGuidedAttention):
            if before is None or not isinstance(before.mixer, HybridScaleAttention):
                raise UsageError(
                    "self_guided merges tokens by the significance that a hybrid_scale attention in the layer before "
                    'finds; give ["hybrid_scale", "self_guided"], which take turns'
                )
            if rotary:
                raise UsageError(
                    "self_guided merges tokens from all over the image, which have no rotary position together; use "
                    "hybrid_scale alone in this model"
                )
            before.tells = host.hears = Significance()
        before = host
