"""What runs say about their cost: phases, scoring, cache bytes against the count, memory, the realised saving."""

from __future__ import annotations

import families
import pytest
import torch
from running import GENERATE, METHODS, generate, mixed_batch, one_image

from vislm import VHR, FlowCut, attach, load_lmm, registry
from vislm.data.scenes import generate_scenes
from vislm.lmm.cost.measuring import compare, fastest, memory_growth
from vislm.lmm.run import PHASES, Run
from vislm.report.run_table import run_lines


@pytest.mark.parametrize("name", METHODS)
def test_cache_bytes_are_the_counted_ones_at_every_step(name) -> None:
    model = families.build("llava")
    for words in (1, 6):
        _, _, run = generate(model, one_image("llava"), *METHODS[name], max_new_tokens=words)
        assert run.kv_bytes == run.kv_bytes_expected > 0
    batch, _ = mixed_batch()
    _, _, run = generate(model, batch, *METHODS[name], num_beams=2)
    assert run.kv_bytes == run.kv_bytes_expected


def test_phases_and_scoring() -> None:
    model = families.build("llava")
    for spec in ("divprune:keep=5", "fastv:keep=5", "pyramiddrop", "visionzip:keep=5", "tome:keep=5", "flowcut:keep=5"):
        _, _, run = generate(model, one_image("llava"), registry.build("pruning", spec))
        assert set(run.seconds) == set(PHASES)
        assert all(run.seconds[phase] > 0 for phase in PHASES), spec
        assert run.seconds["scoring"] < run.seconds["tower"] + run.seconds["prompt"] + run.seconds["prefill"]
    _, _, full = generate(model, one_image("llava"))
    assert full.seconds["scoring"] == 0


def test_pixels_inside_the_forward_are_not_prefill(monkeypatch) -> None:
    """Whoever calls the model and not generate: the tower runs within the model's forward."""
    model = families.build("llava")
    now = [0.0]
    monkeypatch.setattr("vislm.lmm.session.clock", lambda device: now[0])
    tower = model.model.vision_tower.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 5.0))
    decoder = model.model.language_model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 3.0))
    with attach(model) as session, torch.no_grad():
        model(**one_image("llava"))
    tower.remove()
    decoder.remove()
    run = session.last_run
    assert run is not None
    assert (run.seconds["tower"], run.seconds["prompt"], run.seconds["prefill"]) == (5.0, 0.0, 3.0)


def run_with(tower: float, prompt: float, prefill: float, left: int) -> Run:
    seconds = dict.fromkeys(PHASES, 0.0) | {"tower": tower, "prompt": prompt, "prefill": prefill}
    return Run(seconds=seconds, flops={"tower": 100, "prefill": left})


def test_realised_saving() -> None:
    full, pruned = run_with(1.0, 0.0, 3.0, 300), run_with(1.0, 0.2, 1.0, 100)
    assert pruned.realised_saving(full) == pytest.approx((1 - 2.2 / 4) / 0.5)
    assert pruned.realised_saving(full, ("prefill",)) == pytest.approx((1 - 1 / 3) / (2 / 3))
    assert full.realised_saving(full) is None
    best = fastest([pruned, run_with(0.5, 0.3, 2.0, 100)])
    assert (best.seconds["tower"], best.seconds["prompt"], best.seconds["prefill"]) == (0.5, 0.2, 1.0)


def test_memory_growth() -> None:
    kept = []
    result, grown = memory_growth(lambda: kept.append(torch.ones(4_000_000)) or "done", torch.device("cpu"))
    assert result == "done"
    assert grown is None or grown >= 15_000_000


def test_compare(monkeypatch) -> None:
    lmm = load_lmm()
    scene = next(generate_scenes(1, 77))
    asked, ask = [], type(lmm).ask

    def counted(self, *args, **options):
        asked.append(1)
        return ask(self, *args, **options)

    monkeypatch.setattr(type(lmm), "ask", counted)
    found = compare(lmm, scene.image, "Is there a dog?", [FlowCut(keep=16)], [VHR()], rounds=2, max_new_tokens=3)
    assert len(asked) == 1 + 2 * 2 + 2
    assert found.pruned.visual_tokens_kept == [16]
    assert found.full.visual_tokens_kept == [64]
    assert found.full.head_factors
    text = "\n".join(run_lines(found.pruned, found.full))
    for word in ("as counted", "realised until the first word", "in the prefill alone", "scoring", "full run"):
        assert word in text


def test_summary_without_saving() -> None:
    model = families.build("llava")
    with attach(model) as session:
        model.generate(**one_image("llava"), **GENERATE)
    run = session.last_run
    assert run is not None
    assert "no FLOPs saved" in "\n".join(run_lines(run, run))
    run.kv_bytes += 1
    assert any("counted" in line and "as counted" not in line for line in run_lines(run))
