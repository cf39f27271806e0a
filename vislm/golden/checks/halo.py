"""Halo attention's fixtures: the module, and a whole small network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from vislm.attention.halo import HaloAttention, rounded
from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones import HaloNetConfig, HaloStageConfig, build
from vislm.backbones.weights import load_state
from vislm.golden.checks._complete import compared
from vislm.golden.checks._gradients import compare_gradients
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

MODULE, MODEL = 1e-5, 1e-4


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the two kinds apart by the official name."""
    name = fixture.class_or_function
    if name.endswith("HaloAttn"):
        yield from compared(fixture, _module(fixture))
    elif "ByobNet" in name:
        yield from compared(fixture, _model(fixture))
    else:
        raise Unhandled(f"no check for {name!r}")


def _module(fixture: Fixture) -> Iterator[Comparison]:
    x = fixture.inputs["x"].requires_grad_()
    module = HaloAttention(**fixture.kwargs).eval()
    load_state(module, fixture.params, fixture.path.name)
    y = to_map(module(to_tokens(x), x.shape[2:]), module.out_grid(x.shape[2:]))
    yield from _compared(fixture, module, x, y, MODULE)


def _model(fixture: Fixture) -> Iterator[Comparison]:
    x = fixture.inputs["x"].requires_grad_()
    model = build(_config(fixture.kwargs)).eval()
    load_state(model, fixture.params, fixture.path.name)
    yield from _compared(fixture, model, x, model(x), MODEL)


def _compared(fixture: Fixture, module: nn.Module, x: Tensor, y: Tensor, tolerance: float) -> Iterator[Comparison]:
    yield difference("y", y, fixture.outputs["y"], tolerance)
    yield from compare_gradients(fixture, {"x": x, **dict(module.named_parameters())}, {"y": y})


def _config(options: dict[str, Any]) -> HaloNetConfig:
    """Return our fields for timm's: ``c`` is a stage's width, ``br`` times it the attention's."""
    network, blocks = options["cfg"], options["blocks"]
    kinds = {block["type"] for block in blocks}
    if kinds != {"self_attn"} or network.get("self_attn_layer") != "halo" or network.get("stem_type") != "7x7":
        raise Unhandled(f"a network of {sorted(kinds)} with {network}, not of halo bottlenecks behind a 7x7 stem")
    attention = dict(network.get("self_attn_kwargs", {}))
    num_heads = attention.pop("num_heads", 8)
    return HaloNetConfig(
        stages=tuple(
            HaloStageConfig(
                dim=block["c"],
                mid_dim=rounded(block["c"] * block.get("br", 1.0)),
                depth=block["d"],
                num_heads=num_heads,
                stride=block["s"],
            )
            for block in blocks
        ),
        mixer=attention,
        stem_dim=network["stem_chs"],
        stem_pool=network.get("stem_pool") == "maxpool",
        final_dim=network.get("num_features") or None,
        act=network.get("act_layer", "relu"),
        in_chans=options.get("in_chans", 3),
        num_classes=options["num_classes"],
    )
