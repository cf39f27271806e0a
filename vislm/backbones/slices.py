"""Feed-forward branches a part of the tokens at a time, so that what is wide in the middle stays in the cache.

A hidden map of a large image has hundreds of megabytes. On a CPU its way to memory and back, several times, costs more
than the products; and it is most of what inference needs memory for. In training all of it is kept for the gradients
anyway, and a GPU wants large calls: there nothing is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LIMIT = 2**19
"""Hidden values at a time."""


def by_tokens(x: Tensor, width: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``change(x)``, computed for some tokens at a time where that pays.

    Args:
        x: ``(B, N, C)``.
        width: channels in the middle of ``change``.
        change: a map of each token by itself, ``(.., n, C)`` to ``(.., n, C_out)``.
    """
    if not _pays(x, width):
        return change(x)
    parts = (change(part) for part in x.flatten(0, 1).split(max(1, LIMIT // width)))
    return _joined(parts, x.shape[0] * x.shape[1]).unflatten(0, x.shape[:2])


def by_rows(
    x: Tensor,
    grid: Sequence[int],
    width: int,
    before: Callable[[Tensor], Tensor],
    middle: Callable[[Tensor, Sequence[int]], Tensor],
    after: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``after(middle(before(x), grid))``, computed for some rows of the map at a time where that pays.

    Args:
        x: ``(B, N, C)``, the tokens of ``grid``.
        grid: ``(H, W)``.
        width: channels in the middle.
        before: a map of each token by itself.
        middle: a map of the tokens of some rows and their grid, in which rows apart by more than one do not meet, and
            zeros are outside (a 3x3 convolution).
        after: a map of each token by itself.
    """
    if not _pays(x, width):
        return after(middle(before(x), grid))
    strips = (strip for image in x.split(1) for strip in _in_strips(image, grid, LIMIT // width, before, middle))
    return _joined((after(strip[0]) for strip in strips), x.shape[0] * x.shape[1]).unflatten(0, x.shape[:2])


def _in_strips(
    image: Tensor,
    grid: Sequence[int],
    tokens: int,
    before: Callable[[Tensor], Tensor],
    middle: Callable[[Tensor, Sequence[int]], Tensor],
) -> Iterator[Tensor]:
    """Yield ``middle(before(image), grid)`` of an image ``(1, N, C)``, about so many tokens at a time."""
    height, width = grid
    step, seen, above = max(1, tokens // width), 0, image.new_empty(0)
    for start in range(0, height, step):
        end = min(start + step, height)
        below = min(end + 1, height)
        hidden = before(image[:, seen * width : below * width])
        if start:
            hidden = torch.cat((above, hidden), dim=1)
        top, seen, above = max(start - 1, 0), below, hidden[:, -2 * width :]
        strip = middle(hidden, (below - top, width))
        yield strip[:, (start - top) * width : (end - top) * width]


def _joined(parts: Iterator[Tensor], tokens: int) -> Tensor:
    """Return parts ``(n, C)`` one behind the other, ``(tokens, C)``, without all of them in memory twice."""
    whole, start = torch.empty(0), 0
    for part in parts:
        if start == 0:
            whole = part.new_empty(tokens, part.shape[-1])
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _pays(x: Tensor, width: int) -> bool:
    inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return inference and x.device.type == "cpu" and x.shape[0] * x.shape[1] * width > 2 * LIMIT
