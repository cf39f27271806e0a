"""Position ids of prompts that lose tokens: (B, S), or (4, B, S) and (3, B, S) with rows for time, height and width.

In M-RoPE (Qwen-VL) a picture's tokens share few positions: one per frame, row and column. Text behind a picture goes on
behind its longer side. Of four rows the first is the text's own count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.choosing.tokens import gather_rows


def gather_positions(positions: Tensor, index: Tensor) -> Tensor:
    """Return positions (..., B or 1, S) at columns index (B, n), shape (..., B, n)."""
    if positions.dim() == 2:
        return gather_rows(positions, index)
    return positions.expand(-1, index.shape[0], -1).gather(2, index.expand(positions.shape[0], *index.shape))


def text_row(positions: Tensor | None) -> Tensor | None:
    """Return the positions (B, S) that decoder layers are told; None where M-RoPE positions come without them."""
    if positions is None or positions.dim() == 2:
        return positions
    return positions[0] if positions.shape[0] == 4 else None


def next_positions(positions: Tensor, mask: Tensor) -> Tensor:
    """Return the position (B, 1) or (4, B, 1) of the token that follows a prompt with mask (B, S)."""
    count = mask.sum(-1, keepdim=True)
    if positions.dim() == 2:
        return positions.amax(-1, keepdim=True).expand(mask.shape[0], 1) + 1
    grid = positions[-3:].masked_fill(mask == 0, -1).amax((0, 2)) + 1
    return torch.stack([count, *(grid.unsqueeze(-1),) * 3])


def shifted(positions: Tensor, shift: Tensor) -> Tensor:
    """Return positions minus shift (B, 1) or (4, B, 1), both as ``renumber`` made it, for any number of rows."""
    if positions.dim() == 2 or shift.dim() == 2:
        return positions - shift
    return positions - (shift if positions.shape[0] == 4 else shift[-1:])


def renumber(positions: Tensor, index: Tensor, real: Tensor, image_of: Tensor) -> tuple[Tensor, Tensor]:
    """Number the columns that stay anew, without gaps.

    Text counts on. In a picture of M-RoPE, rows, columns and frames that have lost all their tokens are closed up, and
    what follows moves up accordingly; a token keeps its row and column otherwise.

    Args:
        positions: (..., B or 1, S) of all columns.
        index: (B, n) columns that stay.
        real: (B, n) bool, False on padding.
        image_of: (B, S) number of the image that a column belongs to, -1 elsewhere.

    Returns:
        New positions (..., B, n), and by how much the last column's became smaller, (B, 1) or (4, B, 1).
    """
    before = gather_positions(positions, index)
    text = (real.cumsum(-1) - 1).clamp(min=0)
    if positions.dim() == 2:
        return text, before[:, -1:] - text[:, -1:]
    keep = torch.zeros_like(image_of, dtype=torch.bool).scatter_(1, index, real)
    full = positions[-3:].expand(3, *image_of.shape)
    grid = torch.stack([_close_gaps(full[:, b], keep[b], image_of[b]) for b in range(len(keep))], 1)
    after = gather_positions(grid, index)
    shift = before[-3:, :, -1:] - after[..., -1:]
    if positions.shape[0] == 4:
        after = torch.cat([text.unsqueeze(0), after])
        shift = torch.cat([before[:1, :, -1:] - text[None, :, -1:], shift])
    return after, shift


def _close_gaps(grid: Tensor, keep: Tensor, image_of: Tensor) -> Tensor:
    """Return the new positions (3, S) of one prompt's columns with positions grid (3, S)."""
    new, saved = grid.clone(), 0
    bounds = (image_of.diff() != 0).nonzero().flatten().add(1).tolist()
    for begin, end in zip([0, *bounds], [*bounds, len(keep)], strict=True):
        span = slice(begin, end)
        new[:, span] -= saved
        if int(image_of[begin]) < 0:
            continue
        extents = []
        for axis in range(3):
            values, place = grid[axis, span].unique(return_inverse=True)
            width = torch.cat([values.diff(), values.new_ones(1)])
            present = torch.zeros_like(width).index_put_((place[keep[span]],), width.new_ones(1)) * width
            new[axis, span] -= (values - values[0] - present.cumsum(0) + present)[place]
            extents.append((int(width.sum()), int(present.sum())))
        saved += max(full for full, _ in extents[1:]) - max(left for _, left in extents[1:])
    return new
