"""Large-kernel attention's fixtures: the gate, a block, a whole small VAN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vislm.attention.large_kernel import LargeKernelGate
from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones import HierarchicalConfig, StageConfig, build, variant
from vislm.backbones.blocks import BLOCKS
from vislm.backbones.official import convert
from vislm.backbones.reading import found_in, make
from vislm.backbones.weights import load_state
from vislm.golden.checks._complete import compared
from vislm.golden.checks._upstream import compare_ramp_gradients
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

MODULE, MODEL = 1e-5, 1e-4


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by the official name."""
    kind = fixture.class_or_function.rpartition(".")[2]
    if kind not in CHECKS:
        raise Unhandled(f"no check for {fixture.class_or_function!r}")
    yield from compared(fixture, CHECKS[kind](fixture))


def _gate(fixture: Fixture) -> Iterator[Comparison]:
    gate = LargeKernelGate(**fixture.kwargs)
    load_state(gate, fixture.params, fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    yield from _module(fixture, x, gate(x))


def _block(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    stage = StageConfig(dim=options["dim"], depth=1, num_heads=1, ffn={"ratio": options["mlp_ratio"]})
    config = _config(stages=(stage,))
    find = found_in("block", BLOCKS)
    block = make("block", find, config.block, config=config, stage=stage, mixer=config.mixer, drop_path=0).eval()
    prefix = "stages.0.blocks.0."  # official names are converted as those of a whole model
    params = convert({prefix + name: tensor for name, tensor in fixture.params.items()})
    load_state(block, {name.removeprefix(prefix): tensor for name, tensor in params.items()}, fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    yield from _module(fixture, x, to_map(block(to_tokens(x), x.shape[2:]), x.shape[2:]))


def _module(fixture: Fixture, x: Tensor, y: Tensor) -> Iterator[Comparison]:
    yield difference("y", y, fixture.outputs["y"], MODULE)
    yield from compare_ramp_gradients(fixture, {"x": x}, y)


def _model(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    stages = tuple(
        StageConfig(dim=dim, depth=depth, num_heads=1, ffn={"ratio": ratio})
        for dim, depth, ratio in zip(options["embed_dims"], options["depths"], options["mlp_ratios"], strict=True)
    )
    model = build(_config(stages=stages, norm_eps=options["norm_eps"], num_classes=options["num_classes"])).eval()
    load_state(model, convert(fixture.params), fixture.path.name)
    with torch.no_grad():
        tokens = model.forward_features(fixture.inputs["x"])
        pooled, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)
    yield difference("pooled", pooled, fixture.outputs["pooled"], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)


def _config(**fields: Any) -> HierarchicalConfig:
    """Return the published configuration with other fields."""
    config = variant("van_b0").configured(**fields)
    assert isinstance(config, HierarchicalConfig)
    return config


CHECKS = {"LKA": _gate, "Block": _block, "VAN": _model}
"""Official class -> its check."""
