"""FlashBias' fixtures: factored biases against the dense ones, through the attention operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact, relative
from vislm.kernels import (
    Causal,
    Dense,
    LowRankBias,
    Pattern,
    RelativeBias,
    StatisticsRequest,
    Window,
    attend,
    attention_statistics,
)
from vislm.kernels.factors import (
    alibi_bias,
    alibi_slopes,
    decomposed_position_bias,
    factorize_bias,
    resize_position_table,
    spectrum,
    squared_distance_bias,
    truncated_bias,
)

ABSOLUTE, RATIO = 2e-5, 1e-4
HALF_PRECISION = 2e-3


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by the tensors that they hold."""
    inputs, out = fixture.inputs, fixture.outputs
    if "q_bias" in inputs:
        yield from _generic(fixture)
    elif "to_q.weight" in fixture.params:
        yield from _alibi_module(fixture)
    elif "slopes" in out:
        yield from _alibi(fixture)
    elif "pos_q" in inputs:
        yield from _distance(fixture)
    elif "rel_pos_h" in inputs:
        yield from _decomposed(fixture)
    elif "relative_position_bias_table" in inputs:
        yield from _swin(fixture)
    else:
        raise Unhandled(f"inputs {sorted(inputs)} belong to no known FlashBias fixture")


def _generic(fixture: Fixture) -> Iterator[Comparison]:
    names = ("q", "k", "v", "q_bias", "k_bias")
    given = {name: fixture.inputs[name].clone().requires_grad_() for name in names}
    query, key, value, query_factor, key_factor = (_heads_first(given[name]) for name in names)
    factors = LowRankBias(query_factor, key_factor)
    forms = {"factored": factors, "dense": _dense(factors)}
    for form, bias in forms.items():
        output = attend(
            query, key, value, pattern=_pattern(fixture), bias=bias, scale=fixture.kwargs.get("softmax_scale")
        )
        output = _heads_first(output)
        for name in ("y_dense", "y_factored", "y"):
            if name in fixture.outputs:
                yield _close(f"{name} from {form}", output, fixture.outputs[name])
        if not fixture.grads:
            continue
        wanted = [name for name in names if name in fixture.grads]
        loss = (output * fixture.inputs["grad_out"]).sum()
        gradients = torch.autograd.grad(loss, [given[name] for name in wanted], retain_graph=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            yield _close(f"gradient of {name} from {form}", gradient, fixture.grads[name])


def _alibi_module(fixture: Fixture) -> Iterator[Comparison]:
    """The release's module: projections, float16 heads, and a bias that grows with distance."""
    params, x = fixture.params, fixture.inputs["x"]
    slopes = alibi_slopes(fixture.kwargs["heads"], rule="geometric")
    if "slope" in params:
        yield _close("slope", slopes, params["slope"].flatten())
    heads = (
        (x @ params[f"{name}.weight"].T + params.get(f"{name}.bias", 0.0)).unflatten(-1, (len(slopes), -1))
        for name in ("to_q", "to_k", "to_v")
    )
    query, key, value = (_heads_first(part.half().float()) for part in heads)
    bias = alibi_bias(-slopes, x.shape[1])
    output = _heads_first(attend(query, key, value, pattern=_pattern(fixture), bias=bias)).flatten(2)
    output = output @ params["to_out.0.weight"].T + params.get("to_out.0.bias", 0.0)
    yield relative("y", output, fixture.outputs["y"], HALF_PRECISION, RATIO)


def _alibi(fixture: Fixture) -> Iterator[Comparison]:
    query, key, value = _query_key_value(fixture)
    sizes = query.shape[2], key.shape[2]
    slopes = alibi_slopes(query.shape[1], rule="geometric")
    yield _close("slopes", slopes, fixture.outputs["slopes"].flatten())
    forms = {"factors": alibi_bias(slopes, *sizes), "softmax factors": alibi_bias(slopes, *sizes, softmax_only=True)}
    if "bias" in fixture.outputs:
        yield _close("bias", _dense(forms["factors"]), fixture.outputs["bias"])
    for form, bias in forms.items():
        output = attend(query, key, value, pattern=_pattern(fixture), bias=bias)
        yield _close(f"y from {form}", _heads_first(output), fixture.outputs["y"])


def _distance(fixture: Fixture) -> Iterator[Comparison]:
    query, key, value = _query_key_value(fixture)
    points = fixture.inputs["pos_q"], fixture.inputs.get("pos_k", fixture.inputs["pos_q"])
    weight = fixture.inputs["alpha"].transpose(-1, -2)
    for form in ("compact", "paper", "softmax"):
        bias = squared_distance_bias(*points, weight, form=form)
        if form != "softmax" and "bias" in fixture.outputs:
            yield _close(f"bias from the {form} form", _dense(bias), fixture.outputs["bias"])
        output = attend(query, key, value, pattern=_pattern(fixture), bias=bias)
        yield _close(f"y from the {form} form", _heads_first(output), fixture.outputs["y"])


def _decomposed(fixture: Fixture) -> Iterator[Comparison]:
    """Each head stands alone in the batch: ``(B * H, N, D)``."""
    query, key, value = (fixture.inputs[name][:, None] for name in ("q", "k", "v"))
    grids = fixture.kwargs["q_size"], fixture.kwargs["k_size"]
    tables = [
        resize_position_table(fixture.inputs[f"rel_pos_{axis}"], max(sizes))
        for axis, sizes in zip("hw", zip(*grids, strict=True), strict=True)
    ]
    bias = decomposed_position_bias(query, tables, grids[1], query_grid=grids[0])
    yield _close("bias", _dense(bias)[:, 0], fixture.outputs["bias"])
    yield _close("y", attend(query, key, value, bias=bias)[:, 0], fixture.outputs["y"])


def _swin(fixture: Fixture) -> Iterator[Comparison]:
    out, window = fixture.outputs, fixture.kwargs["window"]
    query, key, value = _query_key_value(fixture)
    grid = (window, window) if isinstance(window, int) else tuple(window)
    table = RelativeBias.swin(fixture.inputs["relative_position_bias_table"], grid)
    pattern = Window(grid, grid)
    bias = _materialised(table, pattern, query)
    yield _close("bias_dense", bias, out["bias_dense"])
    values, kept = spectrum(bias)
    yield _close("singular_values", values, out["singular_values"])
    yield _close("energy", kept, out["energy"])
    for name in out:
        if name.startswith("rank_for_"):
            report = factorize_bias(bias, energy=float(name.removeprefix("rank_for_"))).report
            yield exact(name, report.rank, out[name])
    truncated = truncated_bias(bias, fixture.kwargs["rank"])
    yield _close("bias_rank_r", _dense(truncated)[0], out["bias_rank_r"])
    whole = truncated_bias(bias, bias.shape[-1])
    for name, form, given in (
        ("y_dense", "the table", table),
        ("y_dense", "the dense bias", bias),
        ("y_dense", "factors of full rank", whole),
        ("y_rank_r", "factors", truncated),
    ):
        output = attend(query, key, value, pattern=pattern, bias=given)
        yield _close(f"{name} from {form}", _heads_first(output), out[name])


def _materialised(table: RelativeBias, pattern: Window, query: Tensor) -> Tensor:
    """Return the dense bias ``(H, N, N)`` of a table: the logits of an attention between zeros."""
    zero = torch.zeros_like(query[:1])
    request = StatisticsRequest(lse=True, rows=range(zero.shape[2]))
    seen = attention_statistics(zero, zero, request=request, pattern=pattern, bias=table)
    assert seen.rows is not None
    assert seen.lse is not None
    return (seen.rows.log() + seen.lse[..., None])[0]


def _pattern(fixture: Fixture) -> Pattern:
    return Causal() if fixture.kwargs.get("causal") else Dense()


def _query_key_value(fixture: Fixture) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_heads_first(fixture.inputs[name]) for name in ("q", "k", "v"))
    return query, key, value


def _dense(bias: LowRankBias) -> Tensor:
    return bias.query_factor @ bias.key_factor.transpose(-1, -2)


def _heads_first(tensor: Tensor) -> Tensor:
    """Return (B, N, H, D) as (B, H, N, D), or back."""
    return tensor.transpose(1, 2)


def _close(name: str, ours: Tensor, theirs: Tensor) -> Comparison:
    return relative(name, ours.detach(), theirs, ABSOLUTE, RATIO)
