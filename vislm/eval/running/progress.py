"""A progress bar with the time left, on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(name: str, total: int, done: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar by a number of samples; silent where standard error is no terminal.

    Args:
        name: what is counted.
        total: samples in all.
        done: those that an earlier run finished; the time left is reckoned from the others.
        wanted: False: no bar anywhere.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal), transient=True) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda n: bar.update(task, advance=n)
