"""CARVE's picture work: from the attention of two prompts to a map, from the map to regions, from those to a picture.

Numpy and Pillow alone; sizes are in pixels, maps are (rows, columns).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Keep = Literal["remove_small", "size", "attention_sum"]
"""How regions are chosen: drop small ones, keep the largest, or keep those with the highest sum of the map."""
Box = tuple[int, int, int, int]
"""left, top, right, bottom; the last two are outside."""


def contrast(question: np.ndarray, general: np.ndarray, lam: float) -> np.ndarray:
    """Return C = A_Q / (A_G + lambda), weighted by the step's number t = 1, 2, ... and summed over steps and layers.

    Args:
        question: (steps, layers, N) attention of the question on the image tokens; softmaxed, mean over heads.
        general: (steps', layers, N) that of the general instruction; steps that only one of them has do not count.
        lam: lambda.

    Returns:
        (N,) float64.
    """
    steps = min(len(question), len(general))
    ratio = question[:steps].astype(np.float32) / (general[:steps].astype(np.float32) + np.float32(lam))
    return np.einsum("t,tln->n", np.arange(1.0, steps + 1.0), ratio.astype(np.float64))


def enlarge(values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return values (N,) of a token grid (rows, columns) as a map (height, width) float64, enlarged bilinearly.

    Resizing is linear, so that doing it once, behind the sum over steps and layers, gives what the code gives.

    Args:
        values: in scan order.
        grid: rows x columns = N.
        size: (width, height) of the picture.
    """
    cells = Image.fromarray(values.reshape(grid).astype(np.float32))
    return np.asarray(cells.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the 4-connected regions of a mask (height, width) bool: numbers 1..n in scan order, 0 outside, and n."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    roots = _joined_runs(rows, starts, ends)
    _, numbers = np.unique(roots, return_inverse=True)  # a root is its region's first run, so scan order stays
    labels = np.zeros((height, width), dtype=np.int64)
    labels[mask] = np.repeat(numbers + 1, ends - starts)
    return labels, int(numbers.max(initial=-1)) + 1


def _joined_runs(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return, for runs of pixels in scan order, the first run of the region that each belongs to."""
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run in range(len(rows)):
        while above < run and (rows[above] < rows[run] - 1 or (rows[above] < rows[run] and ends[above] <= starts[run])):
            above += 1
        touching = above
        while touching < run and rows[touching] == rows[run] - 1 and starts[touching] < ends[run]:
            one, other = root(run), root(touching)
            parent[max(one, other)] = min(one, other)
            touching += 1
    return np.array([root(run) for run in range(len(rows))], dtype=np.int64)


def choose_regions(
    fused: np.ndarray, top_percent: float, keep: Keep, min_keep: int = 3, outlier_percent: float = 10.0
) -> np.ndarray:
    """Return a mask (height, width) bool: the best regions among the map's highest pixels.

    Args:
        fused: (height, width) map.
        top_percent: share of the pixels that make up the regions, and share of the regions that is kept.
        keep: how regions are ranked.
        min_keep: regions that are kept at least.
        outlier_percent: with "remove_small", the share of those pixels in percent that a region must have; where none
            has it, the largest stays.
    """
    high = fused >= np.percentile(fused, 100.0 * (1.0 - top_percent))
    labels, count = components(high)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if keep == "remove_small":
        chosen = np.nonzero(sizes >= outlier_percent / 100.0 * high.sum())[0]
        chosen = chosen if len(chosen) else np.array([sizes.argmax()])
    else:
        sums = np.bincount(labels.ravel(), weights=fused.ravel(), minlength=count + 1)[1:]
        order = np.argsort(-(sizes if keep == "size" else sums), kind="stable")
        chosen = order[: max(min_keep, int(count * top_percent))]
    return np.isin(labels, chosen + 1)


def bounding_box(mask: np.ndarray) -> Box:
    """Return the smallest box around a mask (height, width) that is not empty."""
    rows, columns = np.nonzero(mask)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def black_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the RGB picture with everything outside the mask (height, width) black."""
    return Image.fromarray(np.where(mask[..., None], np.asarray(image.convert("RGB")), 0).astype(np.uint8))


def crop_size(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a box enlarged until it covers a picture of ``size`` (width, height)."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max(size[0] / width, size[1] / height)
    return int(width * scale), int(height * scale)


def refine(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the picture that is asked about again: blacked out, cropped to the mask's box, enlarged (Lanczos)."""
    box = bounding_box(mask)
    return black_out(image, mask).crop(box).resize(crop_size(box, image.size), Image.Resampling.LANCZOS)
