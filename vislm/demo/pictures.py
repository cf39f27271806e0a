"""The demonstration's pictures."""

from __future__ import annotations

from pathlib import Path

from vislm.data.scene_types import Scene
from vislm.data.turns import CAPTION_QUESTION, caption
from vislm.demo.measure import Outcome
from vislm.demo.settings import PRUNING, VHR, Setting
from vislm.lmm.model import LMM
from vislm.lmm.run import Run
from vislm.registry import build
from vislm.report.curves import Chart, Curve, curve_figure
from vislm.report.heads import head_figure
from vislm.report.panels import Panel, panel_figure
from vislm.report.tokens import token_panels


def draw_scenes(scenes: list[Scene], out: Path) -> Path:
    """Draw the scenes with their true captions."""
    panels = [
        Panel(scene.image.resize((384, 384), 0), f"scene {number}", caption=caption(scene))
        for number, scene in enumerate(scenes, start=1)
    ]
    return panel_figure([panels], out)


def draw_tokens(lmm: LMM, scene: Scene, settings: list[Setting], out: Path) -> Path:
    """Draw, for every pruning method and budget, the tokens that are left and the caption that they give."""
    rows: dict[int, list[Panel]] = {}
    for setting in settings:
        if not setting.pruned_only:
            continue
        with lmm.using(*setting.interventions):
            answer = lmm.ask(scene.image, CAPTION_QUESTION)
        panels = token_panels(scene.image, setting.label, answer, _last(lmm), lmm.adapter, processor=lmm.processor)
        rows.setdefault(setting.keep, []).extend(panels)
    return panel_figure(list(rows.values()), out)


def draw_heads(lmm: LMM, scene: Scene, out: Path) -> Path:
    """Draw the heads that VHR amplifies when the model describes the scene."""
    with lmm.using(build("heads", VHR)):
        lmm.ask(scene.image, CAPTION_QUESTION)
    return head_figure(_last(lmm), lmm.model.config.text_config, out, title=VHR)


def draw_curves(outcomes: list[Outcome], out: Path) -> Path:
    """Draw what each pruning method keeps of POPE's AUROC, over tokens and over FLOPs."""
    full = outcomes[0]
    by_tokens, by_flops = [], []
    for method in PRUNING:
        points = [full, *(o for o in outcomes if o.setting.method == method)]
        values = [o.pope["auroc"] for o in points]
        by_tokens.append(Curve(method, [float(o.setting.keep) for o in points], values))
        by_flops.append(Curve(method, [o.megaflops for o in points], values))
    charts = [
        Chart("visual tokens kept", "POPE adversarial, AUROC", by_tokens),
        Chart("MFLOP of tower and prefill, per question", "POPE adversarial, AUROC", by_flops),
    ]
    return curve_figure(charts, out)


def _last(lmm: LMM) -> Run:
    run = lmm.last_run
    assert run is not None
    return run
