"""SG-Former's fixtures: its three attentions, and a whole small network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vislm.attention import HybridScaleAttention, LepeAttention, SelfGuidedAttention
from vislm.backbones import HierarchicalConfig, StageConfig, build
from vislm.backbones.official import convert
from vislm.backbones.weights import load_state
from vislm.golden.checks._complete import compared
from vislm.golden.checks._upstream import compare_ramp_gradients
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

MODULE, MODEL = 2e-5, 1e-4


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the two kinds apart by the official name."""
    name = fixture.class_or_function
    if name.endswith(".Attention"):
        yield from compared(fixture, _module(fixture))
    elif name.endswith("SGFormer"):
        yield from compared(fixture, _model(fixture))
    else:
        raise Unhandled(f"no check for {name!r}")


def _module(fixture: Fixture) -> Iterator[Comparison]:
    options, x = fixture.kwargs, fixture.inputs["x"].requires_grad_()
    grid = (options["H"], options["W"])
    shared = {name: options[name] for name in ("dim", "num_heads", "qkv_bias", "qk_scale") if name in options}
    maps = dict[str, Tensor]()
    if options["sr_ratio"] == 1:
        module: nn.Module = LepeAttention(**shared)
        load_state(module.eval(), fixture.params, fixture.path.name)
        y = module(x, grid)
    elif options["mask"]:
        module = SelfGuidedAttention(sr_ratio=options["sr_ratio"], **shared)
        load_state(module.eval(), fixture.params, fixture.path.name)
        y = module(x, grid, fixture.inputs["mask_rowmajor"])
    else:
        module = HybridScaleAttention(sr_ratio=options["sr_ratio"], **shared)
        load_state(module.eval(), fixture.params, fixture.path.name)
        y, significance = module(x, grid, significance=True)
        maps["mask_rowmajor"] = significance
        maps["mask_colmajor"] = significance.unflatten(1, grid).transpose(1, 2).flatten(1)
    yield difference("y", y, fixture.outputs["y"], MODULE)
    for name, ours in maps.items():
        yield difference(name, ours, fixture.outputs[name], MODULE)
    yield from compare_ramp_gradients(fixture, {"x": x, **dict(module.named_parameters())}, y)


def _model(fixture: Fixture) -> Iterator[Comparison]:
    x = fixture.inputs["x"].requires_grad_()
    model = build(_config(fixture.kwargs)).eval()
    load_state(model, convert(fixture.params), fixture.path.name)
    tokens = model.forward_features(x)
    logits = model.forward_head(tokens)
    yield difference("pooled", model.forward_head(tokens, pre_logits=True), fixture.outputs["pooled"], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)
    ours = dict(model.named_parameters())
    leaves = {official: ours[name] for name, official in convert({n: n for n in fixture.params}).items()}
    yield from compare_ramp_gradients(fixture, {"x": x, **leaves}, logits)


def _config(options: Mapping[str, Any]) -> HierarchicalConfig:
    columns = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios")
    stages = zip(*(options[name] for name in columns), strict=True)
    attention = {"qkv_bias": options["qkv_bias"], "qk_scale": options.get("qk_scale")}
    return HierarchicalConfig(
        stem={"name": "sg_former", "input_size": options["img_size"]},
        downsample={"name": "sg_former"},
        block={"name": "self_guided"},
        mixer={"name": "lepe", **attention},
        ffn={"name": "residual_conv"},
        norm_eps=options["norm_eps"],
        stage_norm=True,
        stages=tuple(
            StageConfig(
                dim=dim, depth=depth, num_heads=heads, ffn={"ratio": ratio}, blocks=_blocks(reduction, attention)
            )
            for dim, depth, heads, ratio, reduction in stages
        ),
        in_chans=options.get("in_chans", 3),
        num_classes=options["num_classes"],
    )


def _blocks(reduction: int, attention: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    if reduction == 1:
        return ({},)
    return tuple({"name": name, "sr_ratio": reduction, **attention} for name in ("hybrid_scale", "self_guided"))
