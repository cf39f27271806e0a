"""Pictures of the visual tokens that are kept, merged or dropped at each stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vislm.errors import UsageError
from vislm.images import load_image
from vislm.lmm.adapters import Adapter
from vislm.lmm.model import ImageSource
from vislm.lmm.run import Run
from vislm.report.overlay import patch_overlay, seen_picture
from vislm.report.panels import Panel, panel_figure
from vislm.report.token_views import DROPPED, fates, views

_PER_ROW = 4


def token_figure(
    image: ImageSource,
    rows: Sequence[tuple[str, str, Run]],
    adapter: Adapter,
    out: Path,
    *,
    processor: Any | None = None,
    number: int = 0,
    tower: bool = False,
) -> Path:
    """Draw one panel per stage (and per view of a tiled model) of every method; write a PNG, return its path.

    Methods stand side by side while they fit into a row.

    Args:
        image: the picture that the runs are about.
        rows: per method (label, answer, run).
        adapter: the model's adapter, which knows where a token lies in the picture.
        out: PNG file to write.
        processor: the model's processor; says whether the tower sees the whole picture or its centre.
        number: which image of the runs to draw.
        tower: draw what is left inside the vision tower too, wherever a method prunes there.

    Raises:
        UsageError: no rows, or a run without that image.
    """
    picture = load_image(image)
    panels = [
        token_panels(picture, label, answer, run, adapter, processor=processor, number=number, tower=tower)
        for label, answer, run in rows
    ]
    return panel_figure(_side_by_side(panels), Path(out))


def _side_by_side(methods: Sequence[list[Panel]]) -> list[list[Panel]]:
    """Return rows of panels: methods stand beside each other while they fit, longer ones continue below."""
    rows: list[list[Panel]] = []
    for panels in methods:
        if rows and len(rows[-1]) + len(panels) <= _PER_ROW:
            rows[-1] += panels
        else:
            rows += [panels[i : i + _PER_ROW] for i in range(0, len(panels), _PER_ROW)]
    return rows


def token_panels(
    image: Image.Image,
    label: str,
    answer: str,
    run: Run,
    adapter: Adapter,
    *,
    processor: Any | None = None,
    number: int = 0,
    tower: bool = False,
) -> list[Panel]:
    """Return the panels of one run: per stage and view, kept patches clear, merged ones tinted, dropped ones faded.

    Patches that were merged into one token have one colour. A run that dropped nothing gives one panel per view with
    every patch clear. Arguments as in :func:`token_figure`.
    """
    if not 0 <= number < len(run.visual_tokens):
        raise UsageError(f"image number {number}: the run of {label!r} saw {len(run.visual_tokens)} images")
    seen = seen_picture(image, adapter, processor)
    shown = views(run, adapter, number, image.width / image.height)
    panels = []
    for fate in fates(run, number, tower):
        merged = np.where(fate.merged(), fate.owner, DROPPED)
        for view in shown:
            owner, group = fate.owner[view.tokens], merged[view.tokens]
            count = int(np.isin(view.tokens, fate.kept).sum())
            name = f"{view.name}: " if view.name else ""
            subtitle = f"{name}{count} of {view.tokens.size} tokens, {fate.where}"
            picture = patch_overlay(seen, owner != DROPPED, _numbered(group))
            panels.append(Panel(picture, label, subtitle, f"{_merging(owner, group)}{answer}"))
    return panels


def _numbered(group: np.ndarray) -> np.ndarray:
    """Return the groups of merged patches numbered from 0 in order of their seats; -1 stays."""
    seats = np.unique(group[group != DROPPED])
    return np.where(group == DROPPED, -1, np.searchsorted(seats, group))


def _merging(owner: np.ndarray, group: np.ndarray) -> str:
    """Say how many patches were merged into how many tokens; nothing if none was."""
    patches = int((group != DROPPED).sum())
    if not patches:
        return ""
    tokens, dropped = len(np.unique(group[group != DROPPED])), int((owner == DROPPED).sum())
    return f"{patches} patches merged into {tokens}, {dropped} dropped\n"
