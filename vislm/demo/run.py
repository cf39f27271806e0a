"""The demonstration: every figure and picture in it is produced while it runs."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vislm import __version__, registry
from vislm.data.scene_types import Scene
from vislm.data.scenes import generate_scenes, write_scenes
from vislm.data.turns import Turn, caption_turn, colour_turn, count_turn, position_turn, presence_turn, singletons
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.chair import score_caption
from vislm.eval.runner import run
from vislm.eval.vocabulary import vocabulary_of
from vislm.files import atomic_write
from vislm.images import load_image
from vislm.lmm.interventions import Intervention
from vislm.lmm.model import LMM, load_lmm
from vislm.lmm.run import Run
from vislm.report.heads import head_figure
from vislm.report.page import Facts, Figure, Section, Table, Text, write_page
from vislm.report.panels import Panel, panel_figure
from vislm.report.tables import text_table
from vislm.report.tokens import token_panels
from vislm.report.units import bytes_text

Report = Callable[[str], None]
SHOWN_SCENE, HELD_OUT = 20261, 60221
"""Seeds that no training and no calibration used."""

SPECS: list[tuple[str, list[str], list[str]]] = [("all 64 tokens", [], [])]
for _keep in (32, 16, 8):
    SPECS += [(f"{m}, {_keep}", [f"{m}:keep={_keep}"], []) for m in ("random", "fastv", "flowcut")]
SPECS += [
    ("VHR, 64", [], ["vhr:alpha=1.5"]),
    ("flowcut + VHR, 16", ["flowcut:keep=16"], ["vhr:alpha=1.5"]),
]
"""Label, pruning, heads."""


@dataclass(frozen=True)
class Setting:
    """One row of the demonstration."""

    label: str
    methods: tuple[Intervention, ...]


def settings() -> list[Setting]:
    """Build the methods of ``SPECS``."""
    return [
        Setting(
            label,
            (*(registry.build("pruning", p) for p in prune), *(registry.build("heads", h) for h in heads)),
        )
        for label, prune, heads in SPECS
    ]


def run_demo(out: Path, *, scenes: int = 40, photo_layers: int = 3, report: Report = print) -> Path:
    """Run the demonstration into ``out`` and return its page, out/index.html.

    Args:
        out: folder for the page, the pictures and results.json.
        scenes: held-out scenes for POPE and CHAIR.
        photo_layers: decoder layers of the untrained model that gets the photograph.
        report: gets a line of text now and then.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    lmm = load_lmm()
    scene = next(s for s in generate_scenes(100, SHOWN_SCENE) if len(s.present) == 4)
    report("1. The embedded model answers questions about a scene.")
    dialogue = _dialogue(lmm, scene, report)
    report(f"2. The same with fewer visual tokens and reweighted heads; POPE and CHAIR on {scenes} held-out scenes.")
    table = _measure(lmm, scene, out, scenes, report)
    figures = _pictures(lmm, scene, out)
    report("3. A photograph through an untrained model of LLaVA-1.5's true tower and width.")
    photo, photo_figure = _photograph(out, photo_layers, report)
    seconds = time.perf_counter() - started
    page = _page(out, scene, dialogue, table, figures, photo, photo_figure, seconds)
    results = {"dialogue": dialogue, "settings": table, "photograph": photo, "seconds": seconds, "machine": _machine()}
    with atomic_write(out / "results.json") as file:
        json.dump(results, file, indent=1)
    report(f"done in {seconds:.0f} s: {page}")
    return page


# -- the scene ---------------------------------------------------------------------------------------------------------
def scene_turns(scene: Scene) -> list[Turn]:
    """Return the demonstration's questions about a scene with their answers."""
    present, absent = scene.present, scene.absent
    turns = [presence_turn(scene, c) for c in (*present[:3], *absent[:3])]
    turns += [count_turn(scene, c) for c in present[:2]] + [colour_turn(scene, c) for c in present[:3]]
    return [*turns, *(position_turn(scene, c) for c in singletons(scene)[:1]), caption_turn(scene)]


def answered_right(scene: Scene, turn: Turn, text: str) -> bool:
    """Whether an answer is right; a caption is if it names every category and no other."""
    if turn.kind != "caption":
        return text == turn.answer
    score = score_caption(text, scene.present, vocabulary_of([*scene.present, *scene.absent]))
    return not score.hallucinated and score.recall == 1.0


def _ask_all(lmm: LMM, scene: Scene) -> list[str]:
    turns = scene_turns(scene)
    return [a.text for a in lmm.ask_many([scene.image] * len(turns), [t.question for t in turns])]


def _dialogue(lmm: LMM, scene: Scene, report: Report) -> list[dict[str, str]]:
    rows = []
    for turn, text in zip(scene_turns(scene), _ask_all(lmm, scene), strict=True):
        right = "yes" if answered_right(scene, turn, text) else "no"
        rows.append({"question": turn.question, "answer": text, "truth": turn.answer, "right": right})
    report(text_table(rows))
    return rows


def _measure(lmm: LMM, scene: Scene, out: Path, scenes: int, report: Report) -> list[dict[str, Any]]:
    folder = write_scenes(out / "held-out", scenes, HELD_OUT)
    pope, chair = load_benchmark("pope", folder), load_benchmark("chair", folder)
    turns = scene_turns(scene)
    images = [s.image for s in generate_scenes(8, HELD_OUT)]
    rows: list[dict[str, Any]] = []
    full: Run | None = None
    for number, setting in enumerate(settings()):
        with lmm.using(*setting.methods):
            texts = _ask_all(lmm, scene)
            yes_no = run(pope, lmm, out / "runs" / f"{number:02d}-pope", batch_size=64)["metrics"]
            captions = run(chair, lmm, out / "runs" / f"{number:02d}-chair", batch_size=64)["metrics"]
            timed = _timed(lmm, images)
        full = full or timed
        saving = timed.realised_saving(full) if timed is not full else None
        rows.append(
            {
                "setting": setting.label,
                "right": f"{sum(answered_right(scene, t, a) for t, a in zip(turns, texts, strict=True))}/{len(turns)}",
                "POPE adv. acc.": round(yes_no["adversarial"]["accuracy"], 3),
                "AUROC": round(yes_no["adversarial"]["auroc"], 3),
                "yes": round(yes_no["adversarial"]["yes_ratio"], 2),
                "CHAIR_i": round(captions["CHAIR_i"], 3),
                "recall": round(captions["Recall"], 3),
                "tokens": timed.visual_tokens_kept[0],
                "MFLOPs": round((timed.flops["tower"] + timed.flops["prefill"]) / timed.batch / 1e6),
                "KV bytes": timed.kv_bytes // timed.batch,
                "prefill ms": round(timed.seconds["prefill"] * 1e3, 1),
                "saving realised": None if saving is None else f"{saving:.0%}",
            }
        )
        report(f"   {setting.label}: adversarial {rows[-1]['POPE adv. acc.']:.3f}, CHAIR_i {rows[-1]['CHAIR_i']:.3f}")
    report(text_table(rows))
    return rows


def _timed(lmm: LMM, images: Sequence[Any], runs: int = 5) -> Run:
    """Return the last of several equal prefills of a batch, with the medians of their times."""
    seen = []
    for _ in range(runs + 1):
        lmm.ask_many(images, ["is there a dog in the image ?"] * len(images), max_new_tokens=1)
        assert lmm.last_run is not None
        seen.append(lmm.last_run)
    last = seen[-1]
    for phase in ("tower", "prefill"):
        last.seconds[phase] = median(r.seconds[phase] for r in seen[1:])
    return last


def _pictures(lmm: LMM, scene: Scene, out: Path) -> dict[str, Path]:
    question = caption_turn(scene).question
    panels: list[Panel] = []
    for label, prune, _ in SPECS[1:10]:
        with lmm.using(registry.build("pruning", prune[0])):
            answer = lmm.ask(scene.image, question)
        assert lmm.last_run is not None
        panels += token_panels(scene.image, label, answer, lmm.last_run, lmm.adapter, processor=lmm.processor)
    scene.image.resize((256, 256), 0).save(out / "scene.png")
    figures = {"scene": out / "scene.png"}
    figures["tokens"] = panel_figure([panels[i : i + 3] for i in range(0, 9, 3)], out / "tokens.png")
    with lmm.using(registry.build("heads", "vhr:alpha=1.5")):
        lmm.ask(scene.image, question)
    assert lmm.last_run is not None
    figures["heads"] = head_figure(
        lmm.last_run, lmm.model.config.text_config, out / "heads.png", title="VHR, alpha = 1.5"
    )
    return figures


# -- the photograph ----------------------------------------------------------------------------------------------------
PHOTO = Path(__file__).parent.parent / "assets" / "photos" / "astronaut.jpg"


def _photograph(out: Path, layers: int, report: Report) -> tuple[list[dict[str, Any]], Path]:
    from vislm.demo.true_shape import build_llava, photo_inputs, time_prefill
    from vislm.lmm.adapters import adapter_for

    model = build_llava(layers)
    photo = load_image(PHOTO)
    inputs = photo_inputs(photo, model.dtype)
    methods: dict[str, tuple[Intervention, ...]] = {
        "all 576 tokens": (),
        "flowcut, 64": (registry.build("pruning", "flowcut:keep=64"),),
        "fastv, 64": (registry.build("pruning", "fastv:keep=64,layer=1"),),
    }
    timings = [time_prefill(model, inputs, label, chosen, runs=1) for label, chosen in methods.items()]
    full = timings[0].run
    rows = []
    for t in timings:
        saving = t.run.realised_saving(full) if t.run is not full else None
        rows.append(
            {
                "setting": t.label,
                "visual tokens": t.run.visual_tokens_kept[0],
                "tower ms": round(t.tower_seconds * 1e3),
                "prefill ms": round(t.prefill_seconds * 1e3),
                "TFLOPs": round((t.run.flops["tower"] + t.run.flops["prefill"]) / 1e12, 3),
                "KV cache": bytes_text(t.kv_bytes),
                "saving realised": None if saving is None else f"{saving:.0%}",
            }
        )
    report(text_table(rows))
    adapter, note = adapter_for(model), "untrained weights: no answer"
    panels = [p for t in timings[1:] for p in token_panels(photo, t.label, note, t.run, adapter)]
    return rows, panel_figure([panels], out / "photo.png")


# -- the page ----------------------------------------------------------------------------------------------------------
def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, vislm {__version__}"


def _page(
    out: Path,
    scene: Scene,
    dialogue: list[dict[str, str]],
    table: list[dict[str, Any]],
    figures: dict[str, Path],
    photo: list[dict[str, Any]],
    photo_figure: Path,
    seconds: float,
) -> Path:
    sections = [
        Section(
            "A scene, and what the model says about it",
            [
                Figure(figures["scene"], "The scene. Faint and half-hidden objects count as present."),
                Table(dialogue, "Answers of vislm-tiny with all 64 visual tokens."),
            ],
        ),
        Section(
            "Fewer visual tokens, reweighted heads",
            [
                Table(
                    table,
                    "right: the questions above. POPE (adversarial split) and CHAIR on few held-out scenes, so "
                    "read differences of a few hundredths as noise (docs/benchmarks.md has 500 scenes). MFLOPs, key-"
                    "value bytes: one sample. Prefill: median, batch of 8. Saving realised: share of the FLOPs saved "
                    "that shows in tower and prefill time; a model this small is dominated by overheads.",
                ),
                Figure(figures["tokens"], "Visual tokens left after each stage; dropped patches are faded."),
                Figure(figures["heads"], "VHR: factor of each head in each layer for this prompt, and its divergence."),
            ],
        ),
        Section(
            "Real sizes",
            [
                Text(
                    "A photograph through a model of LLaVA-1.5's true tower (CLIP-L/14 at 336 pixels) and width (4096) "
                    "with few decoder layers and random weights: it shows sizes and speed; which patches stay means "
                    "nothing here. FastV drops before the second layer."
                ),
                Table(photo),
                Figure(photo_figure, "Untrained weights. Photograph: NASA, public domain."),
            ],
        ),
    ]
    facts = Facts({"scene": f"seed {SHOWN_SCENE}", "objects": str(len(scene.instances)), "time": f"{seconds:.0f} s"})
    sections[0].blocks.insert(0, facts)
    lead = "Asking a large multimodal model about images, with pruned visual tokens and reweighted heads."
    return write_page(out / "index.html", "vislm demonstration", sections, lead=lead, footer=_machine())
