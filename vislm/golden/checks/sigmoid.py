"""Sigmoid attention's fixtures: self- and cross-attention, and a block with LayerScale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vislm.attention.sigmoid import SigmoidAttention, SigmoidCrossAttention
from vislm.attention.sigmoid_block import SigmoidBlock
from vislm.attention.sigmoid_heads import RowNorm, SigmoidHeads
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, relative
from vislm.kernels import Attended, Causal, Dense, Masked, Padded, Pattern, StatisticsRequest

ABSOLUTE, RATIO = 2e-5, 1e-4
POSITION_BUFFERS = ("alibi", "slope", "freqs", "rope")
"""Parts of the names of constants that the module derives itself."""


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by their parameters."""
    if "norm1.weight" in fixture.params:
        yield from _block(fixture)
    elif "kv_proj.weight" in fixture.params:
        params, inputs = fixture.params, fixture.inputs
        module = SigmoidCrossAttention(
            params["q_proj.weight"].shape[0],
            fixture.kwargs["num_heads"],
            "q_proj.bias" in params,
            "q_norm.weight" in params,
            bias=0.0,
            kv_dim=params["kv_proj.weight"].shape[1],
            row_norm=_row_norm(fixture),
            proj_bias="proj.bias" in params,
        )
        yield from _attention(fixture, module, {"q": inputs["q"], "kv": inputs["kv"]})
    elif "qkv.weight" in fixture.params:
        yield from _attention(fixture, _self_attention(fixture), {"x": fixture.inputs["x"]})
    else:
        raise Unhandled(f"parameters {sorted(fixture.params)} belong to no known sigmoid attention fixture")


def _self_attention(fixture: Fixture, prefix: str = "") -> SigmoidAttention:
    return SigmoidAttention(
        fixture.params[f"{prefix}proj.weight"].shape[0],
        fixture.kwargs["num_heads"],
        f"{prefix}qkv.bias" in fixture.params,
        f"{prefix}q_norm.weight" in fixture.params,
        bias=0.0,
        rope=_mentions(fixture, "rope"),
        alibi=_mentions(fixture, "alibi"),
        row_norm=_row_norm(fixture),
        proj_bias=f"{prefix}proj.bias" in fixture.params,
    )


def _mentions(fixture: Fixture, word: str) -> bool:
    """Return whether class, options or tensors speak of a position encoding."""
    options = [f"{name} {value}" if isinstance(value, str) else name for name, value in fixture.kwargs.items() if value]
    texts = [fixture.class_or_function, *options, *fixture.inputs, *fixture.params, *fixture.outputs]
    return any(word in text.lower() for text in texts)


def _row_norm(fixture: Fixture) -> RowNorm | None:
    activation = fixture.kwargs.get("activation", "sigmoid")
    if "seq_len_normalized" not in activation:
        return None
    return "sqrt_length" if activation.startswith("sqrt") else "length"


def _attention(fixture: Fixture, module: SigmoidHeads, inputs: dict[str, Tensor]) -> Iterator[Comparison]:
    out = fixture.outputs
    _load(module, fixture)
    before_projection: list[Tensor] = []
    module.proj.register_forward_pre_hook(lambda _, arguments: before_projection.append(arguments[0]))
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    sizes = [tensor.shape[1] for tensor in inputs.values()]
    every_row = StatisticsRequest(rows=range(sizes[0]))
    answer: Attended = module(*inputs.values(), pattern=_pattern(fixture, sizes[0], sizes[-1]), statistics=every_row)
    yield from _compared(out, "attn_matrix", answer.statistics.rows)
    yield from _compared(out, "attn_times_v", before_projection[0])
    yield from _compared(out, "attn_proj", answer.output)
    if fixture.grads:
        yield from _gradients(fixture, answer.output, {**inputs, **dict(module.named_parameters())})


def _block(fixture: Fixture) -> Iterator[Comparison]:
    params, out = fixture.params, fixture.outputs
    attention = _self_attention(fixture, "attn.")
    module = SigmoidBlock(
        attention.proj.out_features,
        attention.num_heads,
        mlp_hidden=params["mlp.fc1.weight"].shape[0],
        layer_scale=1.0 if "ls1.gamma" in params else None,
        mlp_bias="mlp.fc2.bias" in params,
        bias=0.0,
    )
    module.attn = attention
    _load(module, fixture)
    seen: dict[str, Tensor] = {}
    for name, part in (("attn_times_v", attention.proj), ("attn_proj", attention), ("mlp_output", module.mlp)):
        part.register_forward_hook(
            lambda _, given, result, name=name: seen.update({name: given[0] if name == "attn_times_v" else result})
        )
    x = fixture.inputs["x"].clone().requires_grad_()
    pattern = _pattern(fixture, x.shape[1], x.shape[1])
    output = module(x, pattern=pattern)
    for name, tensor in seen.items():
        yield from _compared(out, name, tensor)
    if "attn_matrix" in out:
        rows = StatisticsRequest(rows=range(x.shape[1]))
        answer: Attended = attention(module.norm1(x), pattern=pattern, statistics=rows)
        yield from _compared(out, "attn_matrix", answer.statistics.rows)
    yield from _compared(out, "block_output", output)
    if fixture.grads:
        yield from _gradients(fixture, output, {"x": x, **dict(module.named_parameters())})


def _load(module: nn.Module, fixture: Fixture) -> None:
    learned = {k: v for k, v in fixture.params.items() if not any(word in k.lower() for word in POSITION_BUFFERS)}
    module.load_state_dict(learned)


def _pattern(fixture: Fixture, num_queries: int, num_keys: int) -> Pattern:
    if "mask" not in fixture.inputs:
        return Causal() if fixture.kwargs.get("causal") else Dense()
    mask = fixture.inputs["mask"].bool()
    if mask.ndim == 2 and mask.shape != (num_queries, num_keys):
        return Padded(mask)
    return Masked(mask[:, None] if mask.ndim == 3 else mask)


def _gradients(fixture: Fixture, output: Tensor, tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    loss = (output * fixture.inputs["grad_out"]).sum()
    gradients = torch.autograd.grad(loss, [tensors[name] for name in fixture.grads])
    for (name, expected), gradient in zip(fixture.grads.items(), gradients, strict=True):
        yield relative(f"gradient of {name}", gradient, expected, ABSOLUTE, RATIO)


def _compared(outputs: dict[str, Tensor], name: str, ours: Tensor | None) -> Iterator[Comparison]:
    if name in outputs and ours is not None:
        yield relative(name, ours.detach(), outputs[name], ABSOLUTE, RATIO)
