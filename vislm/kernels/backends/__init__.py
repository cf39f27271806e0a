"""The backends in order of preference, and the choice between them.

A backend is a module with ``supports(request) -> str | None`` (why it cannot run the request, None = it can) and
``run(request) -> Answer``. Where another one is faster, it may also say ``only_when_forced(request) -> str | None``.
Adding one is one new file and one row of ``BACKENDS``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vislm.errors import BackendUnavailable, UnknownName
from vislm.kernels.backends import flex, natten, reference, triton, xformers
from vislm.kernels.backends import torch as torch_backend
from vislm.kernels.request import Answer, AttentionRequest

ENVIRONMENT = "VISLM_BACKEND"


class Backend(Protocol):
    """What a backend module offers."""

    def supports(self, request: AttentionRequest) -> str | None:
        """Return why this backend cannot run the request; None = it can."""
        ...

    def run(self, request: AttentionRequest) -> Answer:
        """Compute the request."""
        ...


BACKENDS: Mapping[str, Backend] = {
    "triton": triton,
    "natten": natten,
    "xformers": xformers,
    "flex": flex,
    "torch": torch_backend,
    "reference": reference,
}


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call and why the others would not; ``str()`` gives a table.

    Attributes:
        chosen: the backend's name; None when none can run the call, or the forced one cannot.
        reasons: name -> why it was passed over, in the order of preference; None for the chosen one.
        forced_by: what forced the choice (``"backend="`` or the environment variable), None = automatic.
    """

    chosen: str | None
    reasons: Mapping[str, str | None]
    forced_by: str | None = None

    def __str__(self) -> str:
        width = max(len(name) for name in self.reasons)
        lines = [f"{name:<{width}}  {reason or 'chosen'}" for name, reason in self.reasons.items()]
        return "\n".join(lines + ([f"forced by {self.forced_by}"] if self.forced_by else []))


def explain_choice(request: AttentionRequest, backend: str | None = None) -> Explanation:
    """Return the choice for a request: ``backend``, else ``$VISLM_BACKEND``, else the first that supports it."""
    forced, forced_by = _forced(backend)
    chosen: str | None = None
    reasons: dict[str, str | None] = {}
    for name, candidate in BACKENDS.items():
        reason = _passed_over(candidate, request) if forced != name else None
        if reason is None:
            reason = candidate.supports(request)
        if reason is None and forced not in (None, name):
            reason = f"could run; {forced!r} is forced"
        elif reason is None and chosen is not None:
            reason = f"could run; {chosen!r} comes first"
        elif reason is None:
            chosen = name
        reasons[name] = reason
    return Explanation(chosen, reasons, forced_by)


def choose(request: AttentionRequest, backend: str | None = None) -> Backend:
    """Return the backend of :func:`explain_choice`; raise ``BackendUnavailable`` with the reasons if there is none."""
    forced, forced_by = _forced(backend)
    if forced is not None:
        reason = BACKENDS[forced].supports(request)
        if reason is not None:
            raise BackendUnavailable(f"backend {forced!r} (forced by {forced_by}) cannot run this call: {reason}")
        return BACKENDS[forced]
    for candidate in BACKENDS.values():
        if _passed_over(candidate, request) is None and candidate.supports(request) is None:
            return candidate
    raise BackendUnavailable(f"no backend can run this call:\n{explain_choice(request)}")


def _passed_over(candidate: Backend, request: AttentionRequest) -> str | None:
    """Return why a backend is not chosen by itself although it may be able to run the request."""
    only_when_forced = getattr(candidate, "only_when_forced", None)
    reason = None if only_when_forced is None else only_when_forced(request)
    return None if reason is None else f"only when forced: {reason}"


def _forced(backend: str | None) -> tuple[str | None, str | None]:
    """Return the forced backend's name and what forced it; an argument goes before the environment."""
    name, origin = (backend, "backend=") if backend is not None else (os.environ.get(ENVIRONMENT) or None, ENVIRONMENT)
    if name is None:
        return None, None
    if name not in BACKENDS:
        raise UnknownName("backend", name, BACKENDS, hint="" if backend else f"(from the variable {ENVIRONMENT})")
    return name, origin
