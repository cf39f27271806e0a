"""Attention modules: ``forward(x, grid)`` with ``x (B, N, C)``, prefix tokens first, over one attention operator."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from vislm.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

    from vislm.attention.agent import AgentAttention
    from vislm.attention.agent_cswin import AgentCswinAttention
    from vislm.attention.cswin import CswinAttention
    from vislm.attention.dense import DenseAttention
    from vislm.attention.halo import HaloAttention
    from vislm.attention.hybrid_scale import HybridScaleAttention
    from vislm.attention.large_kernel import LargeKernelAttention
    from vislm.attention.lepe import LepeAttention
    from vislm.attention.moh import MohAttention
    from vislm.attention.moh_aggregated import MohAggregatedAttention
    from vislm.attention.moh_cosine import MohCosineAttention
    from vislm.attention.moh_llama import MohLlamaAttention
    from vislm.attention.neighborhood import NeighborhoodAttention
    from vislm.attention.self_guided import SelfGuidedAttention
    from vislm.attention.sigmoid import SigmoidAttention
    from vislm.attention.super_token import SuperTokenAttention
    from vislm.attention.window import WindowAttention

__all__ = [
    "AgentAttention",
    "AgentCswinAttention",
    "CswinAttention",
    "DenseAttention",
    "HaloAttention",
    "HybridScaleAttention",
    "LargeKernelAttention",
    "LepeAttention",
    "MohAggregatedAttention",
    "MohAttention",
    "MohCosineAttention",
    "MohLlamaAttention",
    "NeighborhoodAttention",
    "SelfGuidedAttention",
    "SigmoidAttention",
    "SuperTokenAttention",
    "WindowAttention",
    "attention_class",
    "attention_names",
]


def attention_names() -> list[str]:
    """Return the names of all attentions: the modules here that define ``<Name>Attention``.

    So ``super_token`` is one because it defines ``SuperTokenAttention``.
    """
    return sorted(name for name in _modules() if _class_of(name) is not None)


def attention_class(name: str | type[nn.Module]) -> type[nn.Module]:
    """Return the class of an attention, built with ``dim=``, ``num_heads=`` and its own options.

    A class is returned as it is, so that one of your own stands wherever a name does.

    Raises:
        UnknownName: no such attention; the message names the nearest ones.
    """
    if isinstance(name, type):
        return name
    found = _class_of(name) if name in _modules() else None  # imports that module alone
    if found is None:
        raise UnknownName("attention", name, attention_names())
    return found


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def _class_of(module: str) -> type[nn.Module] | None:
    return getattr(import_module(f"{__name__}.{module}"), _class_name(module), None)


def _class_name(name: str) -> str:
    return f"{name.title().replace('_', '')}Attention"


def __getattr__(name: str) -> object:
    for module in _modules() if name.endswith("Attention") else ():
        if _class_name(module) == name:
            return attention_class(module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
