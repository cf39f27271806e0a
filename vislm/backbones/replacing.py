"""Another attention inside a pretrained vision transformer of timm or open_clip."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from vislm.attention import attention_class, attention_names
from vislm.backbones.replacing_forms import FORMS, Form, class_name, form_of
from vislm.backbones.replacing_host import GridOfTokens, ReplacedAttention, ReplacedMultihead, exchange
from vislm.backbones.replacing_towers import Tower, tower_of
from vislm.errors import UnknownName, UsageError


def replace_attention(
    model: nn.Module, attention: str, layers: tuple[int, int] = (0, -1), **options: Any
) -> Replacement:
    """Put another attention into a vision transformer, in place; its weights stay.

    The projections, norms of queries and keys, rotary positions, gates and class or register tokens remain the
    model's, under the same names in its state dict; the attention's own parameters (such as ``rpb``) are added as
    ``....mixer.*``. Tables of positions, convolutions of values and routers of heads start at zero, so that a window
    over the whole grid, or a mixture of all heads, gives the original's output.

    Args:
        model: a timm vision transformer (ViT, DeiT, EVA, SigLIP, DINOv2 ..), the visual tower of an open_clip model, or
            the open_clip model around it.
        attention: a name of ``vislm.attention.attention_names()``.
        layers: first and last layer, both included, counted from 0 or from the end.
        options: of the attention, such as ``window_size=7``.

    Returns:
        A handle that puts the original back: ``undo()``, or at the end of ``with replace_attention(...):``. Trained
        projections stay trained.

    Raises:
        UnknownName: an unknown attention or option; names the nearest ones.
        UsageError: a model or an attention whose weights do not fit, or layers that are not there.
    """
    tower, cls = tower_of(model), attention_class(attention)
    first, last = (index + len(tower.blocks) if index < 0 else index for index in layers)
    if not 0 <= first <= last < len(tower.blocks):
        raise UsageError(f"{layers=}, expected the first and last of {len(tower.blocks)} layers")
    known = set(inspect.signature(cls).parameters) - {"dim", "num_heads", "num_prefix_tokens"}
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {attention}", option, known)
    grid, made = GridOfTokens(), list[tuple[nn.Module, ReplacedAttention]]()
    for index in range(first, last + 1):
        original = tower.attention(index)
        made.append((original, _host(attention, original, f"layer {index}", tower, options, grid)))
    return Replacement(tower, range(first, last + 1), made, grid)


class Replacement:
    """What :func:`replace_attention` did, and how to take it back.

    Attributes:
        layers: the layers whose attention was replaced.
    """

    def __init__(
        self, tower: Tower, layers: range, made: Sequence[tuple[nn.Module, ReplacedAttention]], grid: GridOfTokens
    ) -> None:
        self.layers, self._tower, self._made = layers, tower, list(made)
        self._hook = tower.embedding.register_forward_hook(grid)
        for index, (_, host) in zip(layers, made, strict=True):
            tower.put_attention(index, host)

    def undo(self) -> None:
        """Put the original attentions back, with the projections as they are now."""
        self._hook.remove()
        for index, (original, host) in zip(self.layers, self._made, strict=False):
            exchange(host, original)
            original.train(host.training)
            self._tower.put_attention(index, original)
        self._made.clear()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


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


_FROM_ZERO = ("dwc.weight", "dwc.bias", "height_rel", "width_rel", "wg.weight", "wg_0.weight", "wg_1.weight")
"""What an attention adds to the plain one, beside the tables that take no weight decay."""
_WITHOUT_GRID = ("sigmoid",)
"""Attentions for which all tokens are alike."""


def _host(
    attention: str, original: nn.Module, path: str, tower: Tower, options: dict[str, Any], grid: GridOfTokens
) -> ReplacedAttention:
    form = form_of(original, path)
    mixer = _mixer(attention, form, tower, options)
    weight = next(original.parameters())
    mixer.to(weight.device, weight.dtype)
    if isinstance(original, nn.MultiheadAttention):
        return ReplacedMultihead(original, form, attention, mixer, grid)
    return ReplacedAttention(original, form, attention, mixer, grid)


def _mixer(attention: str, form: Form, tower: Tower, options: dict[str, Any]) -> nn.Module:
    cls = attention_class(attention)
    given = {"num_prefix_tokens": tower.num_prefix_tokens, "attn_drop": form.attn_drop, **options}
    known = inspect.signature(cls).parameters
    if tower.num_prefix_tokens and "num_prefix_tokens" not in known and attention not in _WITHOUT_GRID:
        raise UsageError(f"{attention} has no place for the model's {tower.num_prefix_tokens} class or register tokens")
    sizes = {"dim": form.width, "num_heads": form.num_heads}
    mixer = cls(**sizes, **{name: entry for name, entry in given.items() if name in known})
    added = getattr(mixer, "no_weight_decay", set)()
    for name, parameter in mixer.named_parameters():
        if name in added or name.endswith(_FROM_ZERO):
            nn.init.zeros_(parameter)
    return mixer
