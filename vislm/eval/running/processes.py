"""Several processes, on one machine or many, that share one run: started by ``accelerate launch`` or ``torchrun``.

They need a common folder and a network among them for short messages (gloo); pictures and answers are not sent around.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from vislm.errors import UsageError, VislmError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)
"""How long a process waits for slower ones; launchers end all processes as soon as one dies."""

_NAMES = {
    "RANK": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
}


class World:
    """All processes of a run, from the view of one; a single process by default."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def is_first(self) -> bool:
        """Whether this process writes what belongs to the whole run."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of the items: every ``size``-th, from its own number on."""
        return items[self.rank :: self.size]

    def first(self, action: Callable[[], T]) -> T:
        """Run an action in the first process and return its result in all of them.

        Raises:
            VislmError: what the action raised, in every process.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [action(), None]
            except (VislmError, OSError) as error:
                outcome = [None, error]
        import torch.distributed as dist

        told = outcome if outcome[1] is None else [None, str(outcome[1])]
        with _partners():
            dist.broadcast_object_list(told, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        if told[1] is not None:
            raise VislmError(f"process 0: {told[1]}")
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; waits until all are here."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _partners():
            dist.all_gather_object(values, value, group=self._group)
        return values


@contextlib.contextmanager
def launched() -> Iterator[World]:
    """Yield the world that a launcher has set up by environment variables, or that of one process without launcher.

    ``accelerate launch --multi_gpu`` and ``torchrun`` set RANK and WORLD_SIZE; ``accelerate launch --cpu`` starts its
    processes by ``mpirun``, which has names of its own.

    Raises:
        UsageError: the variables contradict each other.
    """
    rank, size = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    if rank >= size:
        raise UsageError(f"the launcher set RANK={rank} and WORLD_SIZE={size}; expected 0 <= RANK < WORLD_SIZE")
    if size == 1:
        yield World()
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        group = None if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield World(rank, size, group)
    finally:
        if ours:
            dist.destroy_process_group()


def own_device(device: str) -> str:
    """Return the device of this process: with several of them on a machine, "cuda" means one card each."""
    if device != "cuda" or _number("WORLD_SIZE", "1") == 1:
        return device
    import torch

    return f"cuda:{_number('LOCAL_RANK', '0') % max(1, torch.cuda.device_count())}"


def _number(name: str, default: str) -> int:
    names = _NAMES[name]
    text = next((os.environ[n] for n in names if n in os.environ), default)
    if not text.isdecimal():
        raise UsageError(f"environment variable {names[0]}={text!r}: expected a whole number")
    return int(text)


@contextlib.contextmanager
def _partners() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's words for a partner that is gone
        raise VislmError(
            "another process of this run has ended; finished samples are kept, start the run again to resume it"
        ) from error
