"""A set of hooks that is installed together and removed together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vislm.lmm.attention import Site, unwatch, watch


class Hooks:
    """Adds forward hooks and watched attentions, and removes exactly those."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._watched: list[nn.Module] = []

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict[str, Any]], Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before the module's forward; it may return new ``(args, kwargs)``."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(
        self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict[str, Any], Any], Any], always: bool = False
    ) -> None:
        """Call ``hook(module, args, kwargs, output)`` after the forward; it may return a new output.

        With ``always`` also when the forward raised (output None).
        """
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always))

    def watch(self, module: nn.Module, site: Site) -> None:
        """Hand every attention call of ``module`` to ``site``."""
        watch(module, site)
        self._watched.append(module)

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            unwatch(module)
        self._handles.clear()
        self._watched.clear()


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a forward call's arguments as one dictionary of names."""
    names = [n for n, p in inspect.signature(module.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}
