"""The tiled attention on grids against the definition: random patterns, biases, sizes, tile sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vislm.kernels import (
    Blocked,
    DecoupledBias,
    Neighborhood,
    RelativeBias,
    Sigmoid,
    StatisticsRequest,
    Window,
    attend,
    attention_statistics,
)
from vislm.kernels.local import plan as plans
from vislm.kernels.local.plan import plan_for, tile_sizes
from vislm.kernels.patterns.grid import padded_grid


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    axes = draw(st.integers(1, 3))
    grid = [draw(st.integers(1, 40 if axes == 1 else 12 if axes == 2 else 6)) for _ in range(axes)]
    window = [draw(st.integers(1, min(size, 9))) for size in grid]
    return Neighborhood(
        grid,
        window,
        stride=[draw(st.integers(1, size)) for size in window],
        dilation=[draw(st.integers(1, size // one)) for size, one in zip(grid, window, strict=True)],
        causal=[draw(st.booleans()) for _ in grid],
        border=draw(st.sampled_from(["shift", "mask"])),
        prefix=draw(st.integers(0, 3)),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Blocked:
    axes, stride = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    block = [stride * draw(st.integers(1, 3)) for _ in range(axes)]
    border = draw(st.sampled_from(["mask", "zero"]))
    grid = [draw(st.integers(1, 3)) * one for one in block]
    if border == "mask":
        grid = [size + stride * draw(st.integers(0, 2)) for size in grid]
    halo = [draw(st.integers(0, 3)) for _ in block]
    prefix = draw(st.integers(0, 2)) if stride == 1 else 0
    return Blocked(grid, block, halo, query_stride=stride, border=border, prefix=prefix)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    grid = [draw(st.integers(1, 12)) for _ in range(draw(st.integers(1, 2)))]
    window = [draw(st.integers(1, size)) for size in grid]
    return Window(grid, window, [draw(st.integers(0, one - 1)) for one in window], prefix=draw(st.integers(0, 2)))


patterns = st.one_of(neighborhoods(), blocks(), windows())


def tensors_for(pattern, *, heads=(4, 2), dims=(5, 3), batch=2, prefix_queries=True, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    num_queries = math.prod(pattern.query_grid) + (pattern.prefix if prefix_queries else 0)
    num_keys = math.prod(pattern.grid) + pattern.prefix
    sizes = ((heads[0], num_queries, dims[0]), (heads[1], num_keys, dims[0]), (heads[1], num_keys, dims[1]))
    return [torch.randn(batch, *size, generator=random, dtype=torch.float64).to(dtype) for size in sizes]


def bias_for(pattern, kind, seed=1):
    random = torch.Generator().manual_seed(seed)
    reach = [2 * max(size) + 1 for size in zip(padded_grid(pattern), pattern.grid, strict=True)]
    reach = [size + 2 * halo for size, halo in zip(reach, getattr(pattern, "halo", [0] * len(reach)), strict=True)]
    if kind == "relative":
        return RelativeBias(torch.randn(4, *reach, generator=random, dtype=torch.float64))
    if kind == "decoupled":
        tables = tuple(torch.randn(size, 5, generator=random, dtype=torch.float64) for size in reach)
        return DecoupledBias(tables, scaled=seed % 2 == 0)
    return None


@given(pattern=patterns, prefix_queries=st.booleans(), kind=st.sampled_from([None, "relative", "decoupled"]))
@settings(max_examples=120, deadline=None)
def test_output_statistics_and_gradients_are_those_of_the_definition(pattern, prefix_queries, kind) -> None:
    causal = isinstance(pattern, Neighborhood) and any(pattern.causal)
    bias = None if causal else bias_for(pattern, kind)
    tensors = tensors_for(pattern, prefix_queries=prefix_queries)
    num_queries, num_keys = tensors[0].shape[2], tensors[1].shape[2]
    key_logits = torch.linspace(-1, 1, num_keys, dtype=torch.float64).expand(2, -1).clone()
    wanted = StatisticsRequest(
        lse=True,
        rows=(0, -1),
        received=torch.arange(num_queries) % 2 == 0,
        mass={"first": torch.arange(num_keys) < num_keys // 2},
        entropy=True,
        maximum=True,
        output_norm=True,
    )
    results = {}
    for backend in ("reference", "torch"):
        result = attend(*tensors, pattern=pattern, bias=bias, key_logits=key_logits, statistics=wanted, backend=backend)
        inputs = [tensor.clone().requires_grad_() for tensor in (*tensors, key_logits)]
        tables = [] if bias is None else [bias.table] if isinstance(bias, RelativeBias) else list(bias.tables)
        leaves = [table.clone().requires_grad_() for table in tables]
        learned = None
        if isinstance(bias, RelativeBias):
            learned = RelativeBias(leaves[0])
        elif isinstance(bias, DecoupledBias):
            learned = DecoupledBias(tuple(leaves), scaled=bias.scaled)
        output, statistics = attend(
            *inputs[:3],
            pattern=pattern,
            bias=learned,
            key_logits=inputs[3],
            statistics=StatisticsRequest(lse=True),
            backend=backend,
        )
        loss = (output * torch.arange(1, 4, dtype=torch.float64)).sum() + statistics.lse.sin().sum()
        results[backend] = (result, torch.autograd.grad(loss, [*inputs, *leaves]))
    (expected, slopes), (ours, our_slopes) = results["reference"], results["torch"]
    torch.testing.assert_close(ours.output, expected.output, rtol=1e-10, atol=1e-10)
    for name, one in vars(expected.statistics).items():
        other = getattr(ours.statistics, name)
        if name == "mass":
            one, other = one["first"], other["first"]
        if name == "weights":
            assert one == other
        else:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(slopes, our_slopes, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-9)


@given(pattern=patterns, data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_allowed_pair_stands_in_exactly_one_tile(pattern, data) -> None:
    assume(not (isinstance(pattern, Blocked) and pattern.border == "zero"))
    tile = tuple(data.draw(st.integers(1, size)) for size in pattern.query_grid)
    plan = plan_for(pattern, torch.device("cpu"), tile)
    num_queries, num_keys = math.prod(pattern.query_grid), pattern.prefix + math.prod(pattern.grid)
    seen = torch.zeros(num_queries, num_keys, dtype=torch.long)
    allowed = plan.allowed[plan.kind] & plan.real[:, :, None]
    queries, keys = torch.broadcast_tensors(plan.queries[:, :, None], plan.keys[:, None])
    seen.index_put_((queries[allowed], keys[allowed]), torch.ones((), dtype=torch.long), accumulate=True)
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    assert torch.equal(seen, pattern.mask(position, torch.arange(num_keys)[None]).long())
    assert torch.equal(plan.queries.flatten()[plan.slot], torch.arange(num_queries))
    assert plan.real.flatten()[plan.slot].all()


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (5, 9), (4, 4)])
@pytest.mark.parametrize("pairs", [1, 300, 1 << 20])
def test_tile_sizes_and_chunks_do_not_show(tile, pairs, monkeypatch) -> None:
    pattern = Neighborhood((5, 9), 3, dilation=(1, 2), prefix=1)
    tensors = tensors_for(pattern, batch=3)
    wanted = StatisticsRequest(received=True, entropy=True)
    expected = attend(*tensors, pattern=pattern, statistics=wanted, backend="reference")
    monkeypatch.setattr("vislm.kernels.local.tiles.CPU_CHUNK_PAIRS", pairs)
    fixed = plan_for(pattern, torch.device("cpu"), tile)
    monkeypatch.setattr("vislm.kernels.local.run.plan_for", lambda pattern, device: fixed)
    result = attend(*tensors, pattern=pattern, statistics=wanted, backend="torch")
    torch.testing.assert_close(result.output, expected.output)
    torch.testing.assert_close(result.statistics.received, expected.statistics.received)
    torch.testing.assert_close(result.statistics.entropy, expected.statistics.entropy)


@pytest.mark.parametrize("row_norm", [None, "length", "sqrt_length"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_sigmoid_on_a_grid(prefix, row_norm) -> None:
    pattern = Neighborhood((6, 7), 3, prefix=prefix)
    results = {}
    for backend in ("reference", "torch"):
        tensors = [tensor.requires_grad_() for tensor in tensors_for(pattern)]
        bias = RelativeBias(torch.linspace(-1, 1, 100, dtype=torch.float64).view(4, 5, 5).requires_grad_())
        normalize = Sigmoid(bias=-2.0, temperature=0.3, row_norm=row_norm)
        output = attend(*tensors, pattern=pattern, bias=bias, normalize=normalize, backend=backend)
        slopes = torch.autograd.grad(output.square().sum(), [*tensors, bias.table])
        with torch.no_grad():
            wanted = StatisticsRequest(received=True, entropy=True, rows=(1,))
            statistics = attention_statistics(
                *tensors, request=wanted, pattern=pattern, bias=bias, normalize=normalize, backend=backend
            )
        assert statistics.weights == "unnormalised"
        results[backend] = [output, *slopes, statistics.received, statistics.entropy, statistics.rows]
    for ours, expected in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(ours, expected)


def test_keys_may_be_removed_until_a_query_sees_nothing() -> None:
    pattern = Neighborhood((1, 9), (1, 3))
    gone = torch.zeros(9)
    gone[:4] = -torch.inf
    query, key, value = (tensor.requires_grad_() for tensor in tensors_for(pattern, dtype=torch.float32))
    wanted = StatisticsRequest(lse=True)
    output, statistics = attend(query, key, value, pattern=pattern, key_logits=gone, statistics=wanted, backend="torch")
    assert (output[:, :, :3] == 0).all()
    assert (statistics.lse[:, :, :3] == -torch.inf).all()
    assert statistics.lse[:, :, 3:].isfinite().all()
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (query, key, value))
    assert (key.grad[:, :, :4] == 0).all()


def test_statistics_on_a_grid_are_differentiable() -> None:
    pattern = Neighborhood((4, 5), 3, prefix=1)
    results = {}
    for backend in ("reference", "torch"):
        tensors = [tensor.requires_grad_() for tensor in tensors_for(pattern)]
        wanted = StatisticsRequest(received=True, entropy=True)
        statistics = attend(*tensors, pattern=pattern, statistics=wanted, backend=backend).statistics
        results[backend] = torch.autograd.grad(
            statistics.received.square().sum() + statistics.entropy.sum(), tensors[:2]
        )
    for ours, expected in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype) -> None:
    pattern = Neighborhood((8, 8), 5)
    tensors = tensors_for(pattern, dtype=dtype, dims=(16, 16))
    exact = attend(*(tensor.double() for tensor in tensors), pattern=pattern, backend="reference")
    output = attend(*tensors, pattern=pattern, backend="torch")
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_full_windows_are_dense_attention() -> None:
    tensors = tensors_for(Window((4, 6), (4, 6)))
    dense = attend(*tensors, backend="torch")
    assert torch.equal(attend(*tensors, pattern=Window((4, 6), (4, 6)), backend="torch"), dense)
    assert torch.equal(attend(*tensors, pattern=Neighborhood((4, 6), (4, 6)), backend="torch"), dense)


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [
        (Window((56, 56), 7), True),
        (Blocked((56, 56), 8, 3), True),
        (Neighborhood((56, 56), 7, stride=7), True),
        (Neighborhood((56, 56), 7, dilation=8), True),
        (Neighborhood((56, 56), 7), False),
    ],
)
def test_chosen_tiles_waste_nothing_where_the_pattern_is_blocked(pattern, exact) -> None:
    plan = plan_for(pattern, torch.device("cpu"))
    inside = plan.allowed[plan.kind].float().mean()
    assert inside > 0.35
    if exact and not isinstance(pattern, Blocked):
        assert inside == 1.0


def test_tiles_stay_below_the_limit(monkeypatch) -> None:
    tile = tile_sizes(Neighborhood((40, 40, 40), 9))
    plan = plan_for(Neighborhood((40, 40, 40), 9), torch.device("cpu"), tile)
    assert plan.queries.shape[1] * plan.keys.shape[1] <= plans.MAX_PAIRS


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_prefix_queries_do_not_see_the_zero_border(backend) -> None:
    pattern = Blocked((4, 6), 2, 1, border="zero", prefix=2)
    tensors = tensors_for(pattern)
    wanted = StatisticsRequest(received=True, lse=True)
    output, statistics = attend(*tensors, pattern=pattern, statistics=wanted, backend=backend)
    dense, expected = attend(tensors[0][:, :, :2], *tensors[1:], statistics=wanted, backend="reference")
    torch.testing.assert_close(output[:, :, :2], dense)
    torch.testing.assert_close(statistics.lse[:, :, :2], expected.lse)


def test_double_backward_is_refused() -> None:
    pattern = Neighborhood((5, 5), 3)
    query, key, value = (tensor.requires_grad_() for tensor in tensors_for(pattern))
    output = attend(query, key, value, pattern=pattern, backend="torch")
    (slope,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_gradcheck() -> None:
    pattern = Neighborhood((3, 4), (3, 2), stride=(2, 1), prefix=1)
    tensors = [tensor.requires_grad_() for tensor in tensors_for(pattern, batch=1, heads=(2, 1), dims=(2, 2))]
    table = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def call(*given):
        result = attend(
            *given[:3],
            pattern=pattern,
            bias=RelativeBias(given[3]),
            statistics=StatisticsRequest(lse=True),
            backend="torch",
        )
        return result.output, result.statistics.lse

    assert torch.autograd.gradcheck(call, (*tensors, table))


def test_a_thread_keeps_its_memory_until_it_is_released() -> None:
    from vislm.kernels.scratch import release_scratch, scratch_for

    pattern = Neighborhood((12, 12), 3)
    query, key, value = tensors_for(pattern)
    with torch.inference_mode():
        first = attend(query, key, value, pattern=pattern, backend="torch")
    kept = scratch_for(query, query.dtype)
    assert kept.bytes > 0
    again = attend(query.requires_grad_(), key, value, pattern=pattern, backend="torch")  # writes to the same memory
    again.sum().backward()
    assert torch.equal(first, again)
    assert scratch_for(query, query.dtype) is kept
    release_scratch()
    assert scratch_for(query, query.dtype).bytes == 0
