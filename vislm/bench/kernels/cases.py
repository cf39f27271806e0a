"""What ``vislm bench kernels`` measures: our backends on local patterns, and other ways to compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UnknownName
from vislm.kernels import BACKENDS, Blocked, DecoupledBias, GridPattern, Neighborhood, Window, attend, explain

PATTERNS = ("neighborhood", "halo", "window")
PEERS = ("sdpa", "flex", "gather", "eager", "natten", "timm")
HALO_ATTN = "vislm as HaloAttn"
GIB = 1 << 30


@dataclass(frozen=True)
class Setting:
    """One problem: a pattern on a grid; plain values only, so that it can be sent to another process.

    Attributes:
        pattern: ``"neighborhood"`` (window), ``"halo"`` (blocks of ``window``, halo ``window // 2``) or ``"window"``
            (shifted by ``window // 2``).
        grid: tokens along each axis.
        window: keys along each axis.
        heads: query and key heads; the batch is 1.
        head_dim: channels of a head.
        memory_limit: bytes; a peer whose N x N or gathered tensors need more is skipped.
        threads: CPU threads.
        device: where to run.
        dtype: name of a torch dtype.
        peers: which of ``PEERS`` to measure beside ours.
    """

    pattern: str
    grid: tuple[int, ...]
    window: int = 7
    heads: int = 3
    head_dim: int = 32
    memory_limit: int = 8 * GIB
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    peers: tuple[str, ...] = PEERS

    @property
    def tokens(self) -> int:
        """Number of queries and of keys."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Case:
    """One way to compute a setting.

    Attributes:
        name: how tables call it.
        inputs: query, key and value (and what else gets gradients) in the layout that this way wants.
        call: makes the output from the inputs.
        against: name of the case of ours that it is compared with; None for our own.
        held: bytes of masks and index tables that are kept between calls.
        no_backward: why it is not measured with gradients; None = it is.
        heads_first: turns its output into ``(B, H, N, D)``.
    """

    name: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    against: str | None = None
    held: int = 0
    no_backward: str | None = None
    heads_first: Callable[[Tensor], Tensor] = field(default=lambda output: output)


@dataclass(frozen=True)
class Skip:
    """A case that cannot be measured, and why."""

    name: str
    reason: str


def pattern_of(setting: Setting) -> GridPattern:
    """Return the pattern of a setting; for ``"halo"`` what lies outside the grid is hidden.

    Raises:
        UnknownName: an unknown pattern.
        UsageError: a window that does not fit the grid.
    """
    match setting.pattern:
        case "neighborhood":
            return Neighborhood(setting.grid, setting.window)
        case "halo":
            return Blocked(setting.grid, setting.window, setting.window // 2)
        case "window":
            return Window(setting.grid, setting.window, setting.window // 2)
    raise UnknownName("pattern", setting.pattern, PATTERNS)


def inputs_of(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Return seeded query, key and value ``(1, H, N, D)``."""
    random = torch.Generator().manual_seed(0)
    shape = (1, setting.heads, setting.tokens, setting.head_dim)
    query, key, value = (
        torch.randn(shape, generator=random).to(setting.device, getattr(torch, setting.dtype)) for _ in range(3)
    )
    return query, key, value


def allowed_pairs(pattern: GridPattern) -> int:
    """Return the number of (query, key) pairs that attend."""
    total = 1
    for axis, size in enumerate(pattern.query_grid):
        first, last = pattern.span(axis, torch.arange(size))
        total *= int(((last - first) // pattern.step(axis) + 1).sum())
    return total


def our_cases(setting: Setting) -> Iterator[Case | Skip]:
    """Yield one case per backend of ours, the preferred one first; the reference is no rival."""
    pattern = pattern_of(setting)
    yield from _per_backend("vislm", inputs_of(setting), lambda q, k, v: (q, k, v, {"pattern": pattern}))


def our_halo_cases(setting: Setting) -> Iterator[Case | Skip]:
    """Yield our backends on timm's version of halo attention: zero keys outside, relative logits of the query."""
    pattern = Blocked(setting.grid, setting.window, setting.window // 2, border="zero")
    origin = (halo_width(setting) - 1 + setting.window // 2,) * len(setting.grid)

    def arguments(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> _Arguments:
        return q, k, v, {"pattern": pattern, "bias": DecoupledBias(tables, origin)}

    yield from _per_backend(HALO_ATTN, (*inputs_of(setting), *halo_tables(setting)), arguments)


def halo_width(setting: Setting) -> int:
    """Return the keys along each axis that a block and its halo hold."""
    return setting.window + 2 * (setting.window // 2)


def halo_tables(setting: Setting) -> tuple[Tensor, ...]:
    """Return seeded tables of relative logits, one ``(2 w - 1, D)`` per axis for blocks with halo of w keys."""
    random = torch.Generator().manual_seed(1)
    shape = (2 * halo_width(setting) - 1, setting.head_dim)
    dtype, scale = getattr(torch, setting.dtype), setting.head_dim**-0.5
    return tuple((torch.randn(shape, generator=random) * scale).to(setting.device, dtype) for _ in setting.grid)


_Arguments = tuple[Tensor, Tensor, Tensor, dict[str, Any]]


def _per_backend(name: str, inputs: tuple[Tensor, ...], arguments: Callable[..., _Arguments]) -> Iterator[Case | Skip]:
    """Yield the call of ``attend`` with ``arguments(*inputs)`` for every backend that would run it by itself."""

    def refusal(backend: str, *tensors: Tensor) -> str | None:
        query, key, value, options = arguments(*tensors)
        reason = explain(query, key, value, **options).reasons[backend]
        return None if reason is None or reason.startswith("could run") else reason

    def call(backend: str, *tensors: Tensor) -> Tensor:
        query, key, value, options = arguments(*tensors)
        return attend(query, key, value, **options, backend=backend)

    learned = [tensor.detach().requires_grad_() for tensor in inputs]
    for backend in BACKENDS:
        if backend == "reference":
            continue
        label, reason = f"{name} ({backend})", refusal(backend, *inputs)
        if reason is None:
            yield Case(label, inputs, partial(call, backend), no_backward=refusal(backend, *learned))
        else:
            yield Skip(label, reason)
