"""A set of hooks that is installed together and removed together."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vislm.lmm.decoder.attention import Around, LogitBias, Site, bias, surround, unwatch, watch


class Hooks:
    """Adds forward hooks and watched attentions, and removes exactly those."""

    def __init__(self) -> None:
        self.paused = False
        self._handles: list[RemovableHandle] = []
        self._watched: list[nn.Module] = []
        self._wrapped: list[tuple[nn.Module, str, Any]] = []

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict[str, Any]], Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before the module's forward; it may return new ``(args, kwargs)``."""

        def unless_paused(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return None if self.paused else hook(module, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(unless_paused, with_kwargs=True))

    def after(
        self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict[str, Any], Any], Any], always: bool = False
    ) -> None:
        """Call ``hook(module, args, kwargs, output)`` after the forward; it may return a new output.

        With ``always`` also when the forward raised (output None).
        """

        def unless_paused(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            return None if self.paused else hook(module, args, kwargs, output)

        self._handles.append(module.register_forward_hook(unless_paused, with_kwargs=True, always_call=always))

    def watch(self, module: nn.Module, site: Site) -> None:
        """Hand every attention call of ``module`` to ``site``."""
        watch(module, lambda call, out: out if self.paused else site(call, out))
        self._watched.append(module)

    def surround(self, module: nn.Module, around: Around) -> None:
        """Let ``around`` compute every attention of ``module``, which may call what would have computed it."""
        surround(module, lambda call, fused: fused() if self.paused else around(call, fused))
        self._watched.append(module)

    def bias(self, module: nn.Module, source: LogitBias) -> None:
        """Add what ``source`` returns to the logits of every attention of ``module``."""
        bias(module, lambda queries, keys: None if self.paused else source(queries, keys))
        self._watched.append(module)

    def wrap(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Let ``around(method, *args, **kwargs)`` answer calls of one object's method.

        For methods that are no ``forward``, where torch has no hook: ``get_image_features`` is called by ``generate``
        before the model's forward, and what it was called with is said nowhere else. The answer is an attribute of the
        one object; the class is not touched, and ``remove`` leaves the object's attributes as they were.
        """
        method = getattr(owner, name)

        def unless_paused(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) if self.paused else around(method, *args, **kwargs)

        self._wrapped.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = functools.update_wrapper(unless_paused, method)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let the model run as if nothing were installed, while the context is open."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            unwatch(module)
        for owner, name, before in reversed(self._wrapped):
            del vars(owner)[name]
            if before is not None:
                vars(owner)[name] = before
        self._handles.clear()
        self._watched.clear()
        self._wrapped.clear()


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any], method: str = "forward") -> dict[str, Any]:
    """Return the arguments of a call of a module's method as one dictionary of names."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_names(getattr(type(module), method)), args, strict=False)), **kwargs}


@functools.lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> list[str]:
    """Return the names of a method's positional arguments. Reading a signature takes longer than a small attention."""
    return [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
