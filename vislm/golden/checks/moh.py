"""Mixture-of-head attention's fixtures: its four attentions with their load-balance loss, and a whole small MoH-ViT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vislm.attention import MohAggregatedAttention, MohAttention, MohCosineAttention, MohLlamaAttention
from vislm.attention.head_routing import head_routings, load_balance_losses
from vislm.backbones import HierarchicalConfig, StageConfig, build
from vislm.backbones.official import convert
from vislm.backbones.weights import load_state
from vislm.golden.checks._complete import compared
from vislm.golden.checks._upstream import compare_ramp_gradients
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

MODULE, MODEL, GRADIENT = 2e-5, 1e-4, 1e-4
OPTIONS = {"shared_head": "shared_heads", "routed_head": "routed_heads", "input_resolution": "pretrained_grid"}
SHARED = ("dim", "num_heads", "qkv_bias")
KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "attention.Attention": (MohCosineAttention, ("input_resolution",)),
    "attention_native.AggregatedAttention": (MohAggregatedAttention, ("input_resolution", "window_size", "sr_ratio")),
    "models.MoHAttention": (MohAttention, ("head_dim", "qk_norm")),
}
"""End of the official name -> our class and its further options."""


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by the official name."""
    name = fixture.class_or_function
    if name.endswith("LlamaAttention"):
        yield from compared(fixture, _llama(fixture))
    elif name.endswith("TransNeXt"):
        yield from compared(fixture, _model(fixture))
    elif any(name.endswith(kind) for kind in KINDS):
        yield from compared(fixture, _module(fixture, *next(KINDS[kind] for kind in KINDS if name.endswith(kind))))
    else:
        raise Unhandled(f"no check for {name!r}")


def _module(fixture: Fixture, cls: type[nn.Module], further: tuple[str, ...]) -> Iterator[Comparison]:
    names = (*SHARED, "shared_head", "routed_head", *further)
    options = {OPTIONS.get(name, name): fixture.kwargs[name] for name in names if name in fixture.kwargs}
    module = cls(**options).eval()
    load_state(module, convert(fixture.params), fixture.path.name)
    x = fixture.inputs["x"].requires_grad_()
    grid = fixture.kwargs.get("input_resolution", [x.shape[1]])
    with head_routings(module) as routings:
        y = module(x, grid)
    yield difference("y", y, fixture.outputs["y"], MODULE)
    leaves = {"x": x, **_official(fixture, module)}
    if "load_balance_loss" not in fixture.outputs:
        yield from compare_ramp_gradients(fixture, leaves, y)
        return
    losses = load_balance_losses(routings)
    yield difference("load_balance_loss", losses, fixture.outputs["load_balance_loss"].view(-1), MODULE)
    yield from _gradients_of(fixture, leaves, y, losses.sum())


def _gradients_of(fixture: Fixture, leaves: Mapping[str, Tensor], y: Tensor, loss: Tensor) -> Iterator[Comparison]:
    """Compare gradients: ``grad.wg.weight`` is that of the loss, others are of the output."""
    for name, theirs in fixture.grads.items():
        if name not in leaves:
            raise Unhandled(f"gradient of {name}: not known how it came about")
        ramp = torch.linspace(-1, 1, y.numel()).view_as(y)
        total = loss if name == "wg.weight" else (y * ramp).sum()
        (ours,) = torch.autograd.grad(total, [leaves[name]], retain_graph=True)
        yield difference(f"grad.{name}", ours, theirs, GRADIENT)


def _llama(fixture: Fixture) -> Iterator[Comparison]:
    options, x = fixture.kwargs, fixture.inputs["x"].requires_grad_()
    module = MohLlamaAttention(
        options["hidden_size"],
        options["num_attention_heads"],
        num_kv_heads=options["num_key_value_heads"],
        rope_theta=options["rope_theta"],
        qkv_bias=options.get("attention_bias", False),
    ).eval()
    load_state(module, fixture.params, fixture.path.name)
    y = module(x, x.shape[1:2], fixture.inputs.get("attention_mask"))
    yield difference("y", y, fixture.outputs["y"], MODULE)
    yield from compare_ramp_gradients(fixture, {"x": x, **dict(module.named_parameters())}, y)


def _model(fixture: Fixture) -> Iterator[Comparison]:
    x = fixture.inputs["x"].requires_grad_()
    model = build(_config(fixture.kwargs)).eval()
    load_state(model, convert(fixture.params), fixture.path.name)
    with head_routings(model) as routings:
        tokens = model.forward_features(x)
    logits = model.forward_head(tokens)
    yield difference("pooled", model.forward_head(tokens, pre_logits=True), fixture.outputs["pooled"], MODEL)
    yield difference("logits", logits, fixture.outputs["logits"], MODEL)
    if "load_balance_losses" in fixture.outputs:
        losses = load_balance_losses(routings)
        yield difference("load_balance_losses", losses, fixture.outputs["load_balance_losses"], MODEL)
    yield from compare_ramp_gradients(fixture, {"x": x, **_official(fixture, model)}, logits)


def _official(fixture: Fixture, module: nn.Module) -> dict[str, Tensor]:
    ours = dict(module.named_parameters())
    return {official: ours[name] for name, official in convert({n: n for n in fixture.params}).items()}


def _config(options: Mapping[str, Any]) -> HierarchicalConfig:
    columns = (
        "embed_dims",
        "depths",
        "num_heads",
        "mlp_ratios",
        "sr_ratios",
        "window_size",
        "shared_head",
        "routed_head",
    )
    stages = []
    for index, row in enumerate(zip(*(options[name] for name in columns), strict=True)):
        dim, depth, num_heads, ratio, reduction, window, shared, routed = row
        mixer: dict[str, Any] = {"name": "moh_cosine" if reduction == 1 else "moh_aggregated"}
        mixer |= {"shared_heads": shared, "routed_heads": routed, "qkv_bias": options["qkv_bias"]}
        mixer |= {"pretrained_grid": options["img_size"] // 4 // 2**index}
        if reduction > 1:
            mixer |= {"window_size": window, "sr_ratio": reduction}
        stages.append(StageConfig(dim=dim, depth=depth, num_heads=num_heads, ffn={"ratio": ratio}, blocks=(mixer,)))
    return HierarchicalConfig(
        stem={"name": "overlapping"},
        downsample={"name": "overlapping"},
        mixer={"name": "moh_cosine"},
        ffn={"name": "conv_glu"},
        norm_eps=options["norm_eps"],
        stage_norm=True,
        stages=tuple(stages),
        in_chans=options.get("in_chans", 3),
        num_classes=options["num_classes"],
    )
