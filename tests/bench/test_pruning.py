"""The benchmark of pruning: its model, its opponent, its figures."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from vislm import FastV, attach
from vislm.bench.pruning.cases import SPECS, Measured, call, method_at
from vislm.bench.pruning.field import field_seconds, map_bytes
from vislm.bench.pruning.model import SHAPE, Subject, build
from vislm.bench.pruning.rows import Row
from vislm.bench.pruning.run import Bench, pruning_lines
from vislm.errors import UnknownName, UsageError
from vislm.lmm.cost.flops import DecoderShape
from vislm.lmm.prompt.image_layout import published_config
from vislm.lmm.run import PHASES, Run

SMALL: dict[str, Any] = {
    "vision_hidden_size": 32,
    "vision_intermediate_size": 48,
    "vision_num_attention_heads": 2,
    "vision_image_size": 64,
    "vision_patch_size": 8,
    "text_hidden_size": 32,
    "text_intermediate_size": 40,
    "text_num_attention_heads": 4,
    "text_num_key_value_heads": 2,
}


@lru_cache
def subject(tokens: int = 64) -> Subject:
    torch.manual_seed(0)
    return build(tokens, tower_layers=3, layers=5, **SMALL)


def test_the_true_shape() -> None:
    decoder = DecoderShape.of(published_config(SHAPE).text_config)
    assert decoder == DecoderShape(24, 896, 14, 2, 64, 4864, 151936)
    assert decoder.kv_bytes([1] * 24, 2) == 12_288
    vision = published_config(SHAPE).vision_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size) == (26, 1152, 4304)


@pytest.mark.parametrize("tokens", [64, 250])
def test_model_and_prompt(tokens) -> None:
    small = subject(tokens)
    found = call(small, ())
    assert found.run.visual_tokens == [small.visual_tokens]
    assert abs(small.visual_tokens - tokens) <= 16
    assert small.crops == (1 if tokens == 64 else 5)
    assert found.seconds >= sum(found.run.seconds[phase] for phase in ("tower", "prompt", "prefill"))


@pytest.mark.parametrize("tokens", [64, 250])
@pytest.mark.parametrize("name", SPECS)
def test_every_method_runs(name, tokens) -> None:
    small = subject(tokens)
    run = call(small, [method_at(name, 0.25)]).run
    assert run.kv_bytes == run.kv_bytes_expected
    assert 0 < run.seconds["scoring"] < sum(run.seconds.values())
    assert run.flops["prefill"] < run.flops["full_prefill"]


def test_the_opponent_computes_fastv() -> None:
    """The field's way is another way to the same answer."""
    small, seen = subject(), {}

    def remember(name):
        return small.model.lm_head.register_forward_hook(lambda module, args, out: seen.update({name: out[:, -1]}))

    for name in ("field", "ours"):
        handle = remember(name)
        if name == "field":
            assert field_seconds(small, 0.25) > 0
        else:
            with attach(small.model, FastV(keep=0.25)), torch.no_grad():
                small.model(**small.inputs)
        handle.remove()
    torch.testing.assert_close(seen["field"], seen["ours"], atol=1e-4, rtol=1e-4)
    assert small.model.config.text_config._attn_implementation == "sdpa"
    columns = small.inputs["input_ids"].shape[1]
    assert map_bytes(small, columns) == 4 * (columns**2 * 4 * 5 + 64**2 * 2 * 3)


def measured(prefill: float, scoring: float, total: float, left: float) -> Measured:
    seconds = dict.fromkeys(PHASES, 0.0) | {"prefill": prefill, "scoring": scoring}
    flops = {"prefill": int(1000 * left), "tower": 1000}
    run = Run(seconds=seconds, flops=flops, prompt_tokens=30, visual_tokens=[20], layer_tokens=[20, 20])
    return Measured(replace(run, kv_bytes=40, kv_bytes_expected=40, memory=defaultdict(dict)), total)


def test_shares() -> None:
    """Half of the prefill's FLOPs and a quarter of all; the least time of each phase and of the rest counts."""
    full = [measured(2.0, 0.0, 4.0, 1.0), measured(3.0, 0.0, 9.0, 1.0)]
    ours = [measured(1.1, 0.1, 3.5, 0.5), measured(1.2, 0.02, 3.15, 0.5)]
    row = Row.of("divprune", 0.5, ours, full)
    assert row.realised_prefill == pytest.approx((1 - 1.1 / 2) / 0.5)
    assert row.realised_total == pytest.approx((1 - (1.1 + 1.95) / 4) / 0.25)
    assert row.scoring_share == pytest.approx(0.01)
    assert row.visual_tokens == 10
    assert len(row.misses()) == 1
    assert len(replace(row, kv_exact=False, scoring=0.1).misses()) == 3
    assert len(replace(row, total=3.2).misses()) == 2
    assert replace(row, prefill=1.0).misses() == []


def test_the_whole_benchmark(tmp_path) -> None:
    small = {"tower_layers": 3, "layers": 5, "sizes": SMALL}
    bench = Bench(64, ("divprune", "fastv"), (0.5, 0.1), rounds=1, dtype="float32", threads=1, **small)
    lines = list(pruning_lines(bench, tmp_path / "pruning.json"))
    table = next(line for line in lines if "realised" in line and "\n" in line)
    assert len(table.splitlines()) == 2 + 4
    assert any("meet all targets" in line for line in lines)
    assert any("the field's way, untouched" in line for line in lines)
    saved = json.loads((tmp_path / "pruning.json").read_text())
    assert (len(saved["rows"]), saved["visual_tokens"], saved["dtype"]) == (4, 64, "float32")
    assert all(row["kv_exact"] for row in saved["rows"])
    assert {row["realised_prefill"] for row in saved["rows"]}


def test_bad_input() -> None:
    with pytest.raises(UnknownName, match="did you mean 'divprune'"):
        Bench(methods=("divprun",)).check()
    with pytest.raises(UsageError, match="ratio in"):
        Bench(keeps=(64.0,)).check()
    with pytest.raises(UsageError, match="at least one of each"):
        Bench(rounds=0).check()
    with pytest.raises(UsageError, match="bfloat16"):
        Bench(dtype="int8").check()
    with pytest.raises(UsageError, match="729 or more"):
        build(100, tower_layers=1, layers=1)
