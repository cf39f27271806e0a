"""The pictures of a run: decoded ahead of the model by threads, and never replaced by anything but the grey control."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from PIL import Image

from vislm.errors import ImageError, UsageError
from vislm.eval.protocol import Asked, Control, Picture, Sample, Stored
from vislm.images import decode, pillow_warnings

GREY = (128, 128, 128)
_AHEAD = 2
"""Batches that are decoded while the model answers one."""


def picture(source: Picture, control: Control = "none") -> Image.Image:
    """Return a picture of a sample, decoded with all checks; a plain grey one of its size for the grey control.

    Raises:
        ImageError: the picture cannot be used; names it.
    """
    with pillow_warnings():
        return _picture(source, control)


def batches(
    samples: Sequence[Sample], size: int, workers: int, control: Control, broken: Callable[[Sample, ImageError], None]
) -> Iterator[list[Asked]]:
    """Yield the samples in order, ``size`` at a time, with their pictures; decoding goes on while a batch is used.

    Args:
        samples: what is left to ask.
        size: of a batch; batches with broken pictures are smaller.
        workers: threads that decode; 0: decode when asked. Nothing but time depends on it.
        control: of the benchmark.
        broken: called in order for each sample with a picture that cannot be used; may raise to stop.
    """
    if workers < 0:
        raise UsageError(f"workers={workers}: expected a whole number >= 0")
    with contextlib.ExitStack() as stack:
        stack.enter_context(pillow_warnings())
        load = _Now(control) if workers == 0 else stack.enter_context(_Threads(control, workers, keep=size))
        rest = iter([samples[start : start + size] for start in range(0, len(samples), size)])
        waiting = deque([(s, [load(p) for p in s.images]) for s in part] for part in islice(rest, 1 + load.ahead))
        while waiting:
            ready = []
            for sample, pictures in waiting.popleft():
                try:
                    ready.append(Asked(sample, tuple(get() for get in pictures)))
                except ImageError as error:
                    broken(sample, error)
            waiting.extend([(s, [load(p) for p in s.images]) for s in part] for part in islice(rest, 1))
            yield ready


def _picture(source: Picture, control: Control) -> Image.Image:
    image = decode(source.data, name=source.name) if isinstance(source, Stored) else decode(source)
    return Image.new("RGB", image.size, GREY) if control == "grey" else image


class _Now:
    """Decodes when the picture is wanted."""

    ahead = 0

    def __init__(self, control: Control) -> None:
        self._control: Control = control

    def __call__(self, source: Picture) -> Callable[[], Image.Image]:
        return lambda: _picture(source, self._control)


class _Threads:
    """Decodes in threads; samples that share a picture and follow each other share its decoding."""

    ahead = _AHEAD

    def __init__(self, control: Control, workers: int, keep: int) -> None:
        self._control: Control = control
        self._pool, self._keep = ThreadPoolExecutor(workers, "vislm-pictures"), keep
        self._recent: OrderedDict[Picture, Future[Image.Image]] = OrderedDict()

    def __call__(self, source: Picture) -> Callable[[], Image.Image]:
        future = self._recent.get(source) or self._pool.submit(_picture, source, self._control)
        self._recent[source] = future
        self._recent.move_to_end(source)
        while len(self._recent) > self._keep:
            self._recent.popitem(last=False)
        return future.result

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
