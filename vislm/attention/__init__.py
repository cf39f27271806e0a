"""Attention modules: ``forward(x, grid)`` with ``x (B, N, C)``, prefix tokens first, over one attention operator."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from vislm.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

    from vislm.attention.halo import HaloAttention
    from vislm.attention.neighborhood import NeighborhoodAttention
    from vislm.attention.sigmoid import SigmoidAttention
    from vislm.attention.window import WindowAttention

__all__ = [
    "HaloAttention",
    "NeighborhoodAttention",
    "SigmoidAttention",
    "WindowAttention",
    "attention_class",
    "attention_names",
]


def attention_names() -> list[str]:
    """Return the names of all attentions: the modules here that define ``<Name>Attention``, as ``super_token`` does
    with ``SuperTokenAttention``."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name for name in modules if hasattr(import_module(f"{__name__}.{name}"), _class_name(name)))


def attention_class(name: str) -> type[nn.Module]:
    """Return the class of an attention, built with ``dim=``, ``num_heads=`` and its own options.

    Raises:
        UnknownName: no such attention; the message names the nearest ones.
    """
    if name not in attention_names():
        raise UnknownName("attention", name, attention_names())
    return getattr(import_module(f"{__name__}.{name}"), _class_name(name))


def _class_name(name: str) -> str:
    return f"{name.title().replace('_', '')}Attention"


def __getattr__(name: str) -> object:
    for module in attention_names() if name.endswith("Attention") else ():
        if _class_name(module) == name:
            return attention_class(module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
