"""Wall times of calls that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vislm.bench.kernels.cases import Case

MATMUL = "matmul"
_MATMUL_SIZE = 1536


def forward_call(case: Case) -> Callable[[], Tensor]:
    """Return the call of a case for inference."""

    def call() -> Tensor:
        with torch.no_grad():
            return case.call(*case.inputs)

    return call


def training_call(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call of a case that also makes the gradients of all its inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs]
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        output = case.call(*inputs)
        if not upstream:
            upstream.append(torch.randn_like(output))
        return torch.autograd.grad(output, inputs, upstream[0])

    return call


def matmul_call(device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a large matrix product: the rate that the machine reaches for the sums that attention is made of."""
    left, right = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(device, dtype) for _ in range(2))
    return lambda: left @ right


def matmul_rate(seconds: float) -> float:
    """Return FLOP/s of :func:`matmul_call` from its time."""
    return 2 * _MATMUL_SIZE**3 / seconds


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, budget: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of every call, round by round.

    Each call runs once to warm up, then all run in turn, ``rounds`` times, so that whatever else the machine does falls
    on all of them alike. No round starts after ``budget`` seconds, except the first.
    """
    for call in calls.values():
        call()
    seen: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > budget:
            break
        for name, call in calls.items():
            seen[name].append(_seconds(call, device))
    return seen


def _seconds(call: Callable[[], object], device: str) -> float:
    _finish(device)
    started = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
