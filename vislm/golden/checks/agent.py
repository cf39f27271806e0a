"""Agent attention's fixtures: its modules, small backbones, and the training-free use in a diffusion model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vislm.attention.agent import AgentAttention
from vislm.attention.agent_sd import AgentSD, agent_attention, match_cells
from vislm.backbones import HierarchicalConfig, StageConfig, ViTConfig, build
from vislm.backbones.backbone import Backbone
from vislm.backbones.official import convert
from vislm.backbones.weights import load_state
from vislm.golden.checks._complete import compared
from vislm.golden.checks._upstream import compare_ramp_gradients
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

MODULE, MODEL = 2e-5, 1e-4


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by the official name."""
    for pattern, run in CHECKS.items():
        if re.search(pattern, fixture.class_or_function):
            yield from compared(fixture, run(fixture))
            return
    raise Unhandled(f"no check for {fixture.class_or_function!r}")


def _module(fixture: Fixture) -> Iterator[Comparison]:
    """The classification form, with and without a class token, and the dense form on another grid."""
    options, params = fixture.kwargs, fixture.params
    table = params["ah_bias"].shape[3], params["aw_bias"].shape[4]
    module = AgentAttention(
        options["dim"],
        options["num_heads"],
        options["agent_num"],
        table,
        agent_shape=options.get("downstream_agent_shape"),
        separate_kv="kv.weight" in params,
        sr_ratio=options.get("sr_ratio", 1),
        kernel_size=options.get("kernel_size", 3),
        qkv_bias=options["qkv_bias"],
        num_prefix_tokens=params["ac_bias"].shape[3] if "ac_bias" in params else 0,
    ).eval()
    load_state(module, params, fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    y = module(x, (options["H"], options["W"]) if "H" in options else table)
    yield difference("y", y, fixture.outputs["y"], MODULE)
    yield from compare_ramp_gradients(fixture, {"x": x, **dict(module.named_parameters())}, y)


def _deit(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    side = options["img_size"] // options["patch_size"]
    entries = [int(options["agent_num"][entry]) for entry in (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)]
    agents = [{"name": "agent", "agent_num": entry, "table_size": side} for entry in entries[: options["agent_layer"]]]
    dense = [{"name": "dense"}] * (options["depth"] - len(agents))
    config = ViTConfig(
        dim=options["embed_dim"],
        depth=options["depth"],
        num_heads=options["num_heads"],
        blocks=(*agents, *dense),
        stem={"name": "patch", "patch_size": options["patch_size"], "norm": False},
        ffn={"name": "mlp", "ratio": options["mlp_ratio"]},
        pos_embed=side,
        num_classes=options["num_classes"],
    )
    yield from _model(fixture, build(config), "pre_logits")


def _swin(fixture: Fixture) -> Iterator[Comparison]:
    options = fixture.kwargs
    if set(options["attn_type"]) != {"A"}:
        raise Unhandled(f"stages of types {options['attn_type']!r}, expected all with agents")
    sides = [options["img_size"] // options["patch_size"] // 2**index for index in range(len(options["depths"]))]
    config = HierarchicalConfig(
        stem={"name": "patch", "patch_size": options["patch_size"]},
        downsample={"name": "merge"},
        mixer={"name": "agent", "qkv_bias": options["qkv_bias"]},
        ffn={"name": "mlp", "ratio": options["mlp_ratio"]},
        stages=tuple(
            StageConfig(
                dim=options["embed_dim"] * 2**index,
                depth=options["depths"][index],
                num_heads=options["num_heads"][index],
                blocks=({"agent_num": int(options["agent_num"][index]), "table_size": side},),
            )
            for index, side in enumerate(sides)
        ),
        num_classes=options["num_classes"],
    )
    yield from _model(fixture, build(config), "pooled")


def _model(fixture: Fixture, model: Backbone, pooled: str) -> Iterator[Comparison]:
    load_state(model.eval(), convert(fixture.params), fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    tokens = model.forward_features(x)
    logits = model.forward_head(tokens)
    yield difference(pooled, model.forward_head(tokens, pre_logits=True), fixture.outputs[pooled], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)
    yield from compare_ramp_gradients(fixture, {"x": x}, logits, "logits")


def _diffusion(fixture: Fixture) -> Iterator[Comparison]:
    """The merged tokens and what attention gives them, sorted as the fixture has them, and the unmerged output."""
    kwargs, x, params = fixture.kwargs, fixture.inputs["x"], fixture.params
    if not kwargs["no_rand"]:
        raise Unhandled("random destinations, whose draws are not part of the fixture")
    options = AgentSD(cell=(kwargs["sy"], kwargs["sx"]), **{name: kwargs[name] for name in SHARED})
    matching = match_cells(x, (kwargs["h"], kwargs["w"]), options)
    query, key, value, out = (
        partial(linear, weight=params[f"{name}.weight"], bias=params.get(f"{name}.bias"))
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
    features, agents = matching.features(x), matching.agents(x)
    attended = agent_attention(features, agents, query, key, value, out, kwargs["heads"], options)
    results: dict[str, Any] = {"merged": features, "agents": agents, "attn": attended}
    for name, ours in results.items():
        yield difference(f"{name}_sorted", _sorted(ours), fixture.outputs[f"{name}_sorted"], MODULE)
    yield difference("unmerged", matching.unmerge(attended), fixture.outputs["unmerged"], MODULE)


def _sorted(x: Tensor) -> Tensor:
    """Return each sample's rows by their first channel."""
    return torch.stack([sample[sample[:, 0].argsort()] for sample in x])


SHARED = ("ratio", "agent_ratio", "k_scale2", "k_shortcut")
CHECKS: dict[str, Callable[[Fixture], Iterator[Comparison]]] = {
    r"AgentAttention$": _module,
    r"agent_deit\.VisionTransformer$": _deit,
    r"AgentSwinTransformer$": _swin,
    r"make_agent_attn$": _diffusion,
}
"""Official name -> its check."""
