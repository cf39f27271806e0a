"""The demonstration: every figure and picture in it is produced while it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vislm import __version__
from vislm.data.scenes import generate_scenes
from vislm.demo.measure import measure
from vislm.demo.page import write_demo_page
from vislm.demo.photograph import measure_photograph
from vislm.demo.pictures import draw_curves, draw_heads, draw_scenes, draw_tokens
from vislm.demo.questions import Reply, ask_about
from vislm.demo.settings import settings
from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.lmm.model import load_lmm
from vislm.report.tables import Cell, text_table

SHOWN = 20261
"""Seed of the scenes that are shown; no training and no calibration used it."""


def run_demo(out: Path, *, scenes: int = 40, photo_layers: int = 3, report: Callable[[str], None] = print) -> Path:
    """Run the demonstration into ``out`` and return its page, out/index.html.

    Args:
        out: folder for the page, the pictures and results.json.
        scenes: held-out scenes for POPE and CHAIR.
        photo_layers: decoder layers of the untrained model that gets the photograph, 2 or more.
        report: gets a line of text now and then.

    Raises:
        UsageError: no scenes, or too few layers.
    """
    if scenes < 1 or photo_layers < 2:
        raise UsageError(f"scenes={scenes}, photo_layers={photo_layers}: expected scenes >= 1 and photo_layers >= 2")
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    lmm, compared = load_lmm(), settings()
    shown = [s for s in generate_scenes(40, SHOWN) if len(s.present) == 4][:3]
    report("1. The embedded model answers questions about a scene.")
    dialogue = [_row(reply) for reply in ask_about(lmm, shown[:1])[0]]
    report(text_table(dialogue))
    report(f"2. Fewer visual tokens, amplified heads; POPE and CHAIR on {scenes} held-out scenes.")
    outcomes, oracle = measure(lmm, compared, shown, scenes, report)
    table = [outcome.row for outcome in outcomes]
    report(text_table(table))
    figures = {
        "scenes": draw_scenes(shown, out / "scenes.png"),
        "tokens": draw_tokens(lmm, shown[0], compared, out / "tokens.png"),
        "curves": draw_curves(outcomes, out / "curves.png"),
        "heads": draw_heads(lmm, shown[0], out / "heads.png"),
    }
    report("3. A photograph through an untrained model of LLaVA-1.5's true tower and width.")
    sizes = measure_photograph(out / "photo.png", photo_layers)
    report(text_table(sizes.rows))
    seconds, machine = time.perf_counter() - started, _machine()
    right = sum(row["right"] == "yes" for row in dialogue)
    page = write_demo_page(
        out / "index.html",
        dialogue=dialogue,
        table=table,
        oracle=oracle,
        figures=figures,
        sizes=sizes,
        held_out=scenes,
        facts={
            "right about scene 1": f"{right} of {len(dialogue)}",
            "settings": str(len(table)),
            "time": f"{seconds:.0f} s",
        },
        machine=machine,
    )
    results = {
        "dialogue": dialogue,
        "settings": table,
        "oracle": oracle,
        "photograph": sizes.rows,
        "photograph_model": {"layers": sizes.layers, "dtype": sizes.dtype},
        "held_out_scenes": scenes,
        "machine": machine,
        "seconds": seconds,
    }
    with atomic_write(out / "results.json") as file:
        json.dump(results, file, indent=1)
    report(f"done in {seconds:.0f} s: {page}")
    return page


def _row(reply: Reply) -> dict[str, Cell]:
    return {**dataclasses.asdict(reply), "right": "yes" if reply.right else "no"}


def _machine() -> str:
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{platform.machine()}, {cores} cores, {threads} threads, torch {torch.__version__}, vislm {__version__}"
