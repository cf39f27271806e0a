"""Neighborhood attention's fixtures: operators, merging, modules, whole small models, tile counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vislm.attention.neighborhood import NeighborhoodAttention
from vislm.backbones import HierarchicalConfig, StageConfig, build
from vislm.backbones.official import convert
from vislm.golden.checks._complete import compared
from vislm.golden.checks._gradients import compare_gradients
from vislm.golden.checks._tile_counts import check_tile_counts
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference
from vislm.kernels import Neighborhood, StatisticsRequest, attend, merge

FORWARD, GRADIENT, MODEL, HALF = 1e-5, 1e-4, 1e-4, 2e-2
MODULE_OPTIONS = {
    "embed_dim": "dim",
    "kernel_size": "window_size",
    "is_causal": "causal",
    **{name: name for name in ("dim", "num_heads", "stride", "dilation", "qkv_bias", "qk_scale")},
}


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by the official name."""
    for pattern, run in CHECKS.items():
        if re.search(pattern, fixture.class_or_function):
            yield from compared(fixture, run(fixture))
            return
    raise Unhandled(f"no check for {fixture.class_or_function!r}")


def _operator(fixture: Fixture) -> Iterator[Comparison]:
    inputs = {name: fixture.inputs[name].requires_grad_() for name in ("query", "key", "value")}
    context = [fixture.inputs[name].requires_grad_() for name in fixture.inputs if name.startswith("additional_")]
    output, lse = _neighborhood(fixture, *inputs.values(), *context)
    half = output.dtype != torch.float32
    yield difference("output", output, fixture.outputs["output"], HALF if half else FORWARD)
    yield difference("logsumexp", lse, fixture.outputs["logsumexp"], HALF if half else FORWARD)
    leaves, results = fixture.inputs, {"output": output, "logsumexp": lse}
    yield from compare_gradients(fixture, leaves, results, HALF if half else GRADIENT)
    if "output_fp32" in fixture.outputs:
        output, lse = _neighborhood(fixture, *(t.float() for t in (*inputs.values(), *context)))
        yield difference("output_fp32", output, fixture.outputs["output_fp32"], FORWARD)
        yield difference("logsumexp_fp32", lse, fixture.outputs["logsumexp_fp32"], FORWARD)
    if "mask" in fixture.outputs:
        pattern = _pattern(fixture)
        index = pattern.prefix + torch.arange(len(fixture.outputs["mask"]))
        ours = pattern.mask(index[:, None], index[None])
        yield difference("mask", ours.to(torch.uint8), fixture.outputs["mask"], 0.0)


def _pattern(fixture: Fixture) -> Neighborhood:
    options = fixture.kwargs
    context = fixture.inputs.get("additional_keys")
    return Neighborhood(
        tuple(fixture.inputs["query"].shape[1:-2]),
        options["kernel_size"],
        stride=options.get("stride", 1),
        dilation=options.get("dilation", 1),
        causal=options.get("is_causal", False),
        prefix=0 if context is None else context.shape[1],
    )


def _neighborhood(fixture: Fixture, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return output ``[B, *grid, H, D]`` and log-sum-exp of tensors in that layout; further keys are a prefix."""
    grid = tensors[0].shape[1:-2]
    query, key, value, *context = (t.flatten(1, -3).transpose(1, 2) for t in tensors)
    if context:
        key, value = torch.cat((context[0], key), dim=2), torch.cat((context[1], value), dim=2)
    output, statistics = attend(
        query,
        key,
        value,
        pattern=_pattern(fixture),
        scale=fixture.kwargs.get("scale"),
        statistics=StatisticsRequest(lse=True),
    )
    assert statistics.lse is not None
    return output.transpose(1, 2).unflatten(1, grid), statistics.lse.transpose(1, 2).unflatten(1, grid)


def _merge(fixture: Fixture) -> Iterator[Comparison]:
    inputs = {name: tensor.requires_grad_() for name, tensor in fixture.inputs.items()}
    count = sum(name.startswith("lse") for name in inputs)
    output, lse = merge([(inputs[f"output{i}"], inputs[f"lse{i}"]) for i in range(count)])
    yield difference("output", output, fixture.outputs["output"], FORWARD)
    yield difference("logsumexp", lse, fixture.outputs["logsumexp"], FORWARD)
    yield from compare_gradients(fixture, inputs, {"output": output, "logsumexp": lse})


def _module(fixture: Fixture) -> Iterator[Comparison]:
    x = fixture.inputs["x"].requires_grad_()
    grid = tuple(x.shape[1:-1])
    options = {ours: fixture.kwargs[name] for name, ours in MODULE_OPTIONS.items() if name in fixture.kwargs}
    window = options.pop("window_size")
    module = NeighborhoodAttention(
        window_size=[window] * len(grid) if isinstance(window, int) else window,
        rel_pos_bias="rpb" in fixture.params,
        **options,
    ).eval()
    module.load_state_dict(fixture.params)
    y = module(x.flatten(1, -2), grid).unflatten(1, grid)
    yield difference("y", y, fixture.outputs["y"], FORWARD)
    yield from compare_gradients(fixture, {"x": x, **dict(module.named_parameters())}, {"y": y})


def _model(fixture: Fixture) -> Iterator[Comparison]:
    """NAT and DiNAT_s; ``out.level{i}`` comes behind the official downsampler, which opens our next stage."""
    options = fixture.kwargs
    shape = "dinat_s" if "DiNAT_s" in fixture.class_or_function else "nat"
    model = build(_config(options, shape)).eval()
    model.load_state_dict(convert(fixture.params))
    x, seen = fixture.inputs["x"].requires_grad_(), dict[str, tuple[Tensor, tuple[int, int]]]()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: output})

    model.get_submodule("stem").register_forward_hook(keep("stem"))
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(keep(f"level{index}"))
        if index:
            stage.get_submodule("downsample").register_forward_hook(keep(f"level{index - 1}"))
    tokens = model.forward_features(x)
    for name in sorted(seen.keys() & fixture.outputs.keys()):
        features, grid = seen[name]
        yield difference(name, features.unflatten(1, grid), fixture.outputs[name], MODEL)
    pooled, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)
    yield difference("pooled", pooled, fixture.outputs["pooled"], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)
    ours = dict(model.named_parameters())
    leaves = {official: ours[name] for name, official in convert({n: n for n in fixture.params}).items()}
    yield from compare_gradients(fixture, {"x": x, **leaves}, {"logits": logits})


def _config(options: dict[str, Any], shape: str) -> HierarchicalConfig:
    depths, heads, width = options["depths"], options["num_heads"], options["embed_dim"]
    dilations = options.get("dilations") or [[1] * depth for depth in depths]
    return HierarchicalConfig(
        stem={"name": "conv"} if shape == "nat" else {"name": "patch", "patch_size": options.get("patch_size", 4)},
        downsample={"name": "conv" if shape == "nat" else "merge"},
        mixer={
            "name": "neighborhood",
            "window_size": options["kernel_size"],
            "rel_pos_bias": True,
            "qkv_bias": options.get("qkv_bias", True),
            "qk_scale": options.get("qk_scale"),
        },
        ffn={"name": "mlp", "ratio": options["mlp_ratio"]},
        layer_scale=options.get("layer_scale"),
        stages=tuple(
            StageConfig(
                dim=width * 2**i, depth=depth, num_heads=num_heads, blocks=tuple({"dilation": d} for d in dilation)
            )
            for i, (depth, num_heads, dilation) in enumerate(zip(depths, heads, dilations, strict=True))
        ),
        in_chans=options.get("in_chans", 3),
        num_classes=options.get("num_classes", 1000),
    )


CHECKS: dict[str, Callable[[Fixture], Iterator[Comparison]]] = {
    r"na[123]d$": _operator,
    r"merge_attentions$": _merge,
    r"NeighborhoodAttention[123]D$": _module,
    r"(NAT|DiNAT|DiNAT_s)$": _model,
    r"tile count": check_tile_counts,
}
"""Official name -> its check."""
