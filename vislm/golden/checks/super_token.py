"""Super-token attention's fixtures: the attention, a block, a whole small STViT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vislm.attention.super_token import SuperTokenAttention
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


def _attention(fixture: Fixture) -> Iterator[Comparison]:
    yield from _module(fixture, SuperTokenAttention(**fixture.kwargs))


def _block(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    stage = _stage(options, options["dim"], 1, options["num_heads"], options["stoken_size"], options["layerscale"])
    config = _config(stages=(stage,), mixer=_mixer(options), ffn={"ratio": options["mlp_ratio"]})
    mixer = {**config.mixer, **stage.blocks[0]}
    block = make("block", found_in("block", BLOCKS), config.block, config=config, stage=stage, mixer=mixer, drop_path=0)
    prefix = "stages.0.blocks.0."  # official names are converted as those of a whole model
    params = convert({prefix + name: tensor for name, tensor in fixture.params.items()})
    fixture.params = {name.removeprefix(prefix): tensor for name, tensor in params.items()}
    yield from _module(fixture, block)


def _module(fixture: Fixture, module: nn.Module) -> Iterator[Comparison]:
    load_state(module.eval(), fixture.params, fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    grid = x.shape[2:]
    y = to_map(module(to_tokens(x), grid), grid)
    yield difference("y", y, fixture.outputs["y"], MODULE)
    yield from compare_ramp_gradients(fixture, {"x": x}, y)


def _model(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    names = ("embed_dim", "depths", "num_heads", "stoken_size", "layerscale")
    config = _config(
        stages=tuple(_stage(options, *sizes) for sizes in zip(*(options[name] for name in names), strict=True)),
        mixer=_mixer({**options, "n_iter": options["n_iter"][0]}),
        ffn={"ratio": options["mlp_ratio"]},
        final={"num_features": options["projection"]},
        num_classes=options["num_classes"],
    )
    model = build(config).eval()
    load_state(model, convert(fixture.params), fixture.path.name)
    with torch.no_grad():
        tokens = model.forward_features(fixture.inputs["x"])
        pooled, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)
    yield difference("pooled", pooled, fixture.outputs["pooled"], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)


def _stage(options: dict[str, Any], dim: int, depth: int, num_heads: int, cell: Any, scaled: bool) -> StageConfig:
    scale = options["init_values"] if scaled else None
    return StageConfig(dim=dim, depth=depth, num_heads=num_heads, blocks=({"stoken_size": cell},), layer_scale=scale)


def _mixer(options: dict[str, Any]) -> dict[str, Any]:
    return {"n_iter": options["n_iter"], "qkv_bias": options["qkv_bias"]}


def _config(**fields: Any) -> HierarchicalConfig:
    """Return the published configuration with other fields."""
    config = variant("stvit_small").configured(**fields)
    assert isinstance(config, HierarchicalConfig)
    return config


CHECKS = {"StokenAttention": _attention, "StokenAttentionLayer": _block, "STViT": _model}
"""Official class -> its check."""
