"""A set of hooks that is installed together and removed together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vislm.lmm.attention import LogitBias, Site, bias, unwatch, watch


class Hooks:
    """Adds forward hooks and watched attentions, and removes exactly those."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._watched: list[nn.Module] = []
        self._wrapped: list[tuple[nn.Module, str]] = []

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

    def bias(self, module: nn.Module, source: LogitBias) -> None:
        """Add what ``source`` returns to the logits of every attention of ``module``."""
        bias(module, source)
        self._watched.append(module)

    def wrap(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Let ``around(method, *args, **kwargs)`` answer calls of one object's method.

        For methods that are no ``forward``, where torch has no hook. The class is not touched, and ``remove`` uncovers
        the method again.
        """
        method = getattr(owner, name)
        owner.__dict__[name] = functools.update_wrapper(functools.partial(around, method), method)
        self._wrapped.append((owner, name))

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            unwatch(module)
        for owner, name in self._wrapped:
            owner.__dict__.pop(name, None)
        self._handles.clear()
        self._watched.clear()
        self._wrapped.clear()


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any], method: str = "forward") -> dict[str, Any]:
    """Return the arguments of a call of a module's method as one dictionary of names."""
    function = getattr(type(module), method)
    names = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
