"""Fused attention on grids, interpreted: against the textbook in float64, NATTEN's own numbers, and its own plan."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, Problem, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from vislm.kernels import Blocked, Neighborhood, RelativeBias, StatisticsRequest, Window, attend
from vislm.kernels.backends import triton as backend
from vislm.kernels.backends.triton.neighborhood import operands as neighborhood_operands
from vislm.kernels.backends.triton.neighborhood.plan import TileConfig, geometry, key_tiles, query_tiles
from vislm.kernels.checks import checked_request
from vislm.kernels.lowering import lowered
from vislm.kernels.patterns.grid import padded_grid

GOLDEN = Path(__file__).parents[2] / "golden" / "neighborhood"
SMALL = TileConfig(tokens=16, block=32, num_warps=4, num_stages=1)
CPU = torch.device("cpu")
CASES = [
    ("na1d_causal", "none"),
    ("na1d", "relative"),
    ("na2d", "relative"),
    ("na2d_dilated", "relative"),
    ("na2d_stride", "decoupled"),
    ("na2d_masked", "none"),
    ("na2d_causal", "none"),
    ("na3d", "relative"),
    ("na3d_mixed", "none"),
    ("halo_zero_strided", "decoupled"),
    ("halo3d", "decoupled"),
    ("swin_shifted", "relative"),
    ("na2d_dilated+prefix", "relative"),
    ("swin+prefix_keys", "none"),
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where PyTorch would not fill it: deterministic algorithms are refused to the bias' atomic additions."""
    fresh = torch.empty

    def filled(make: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return wrapper

    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch, "empty", filled(fresh))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the tiny grids do not fit into."""
    monkeypatch.setattr(neighborhood_operands, "tile_config", lambda *_: SMALL)


def checked(query: Tensor, key: Tensor, value: Tensor | None, **options: Any) -> Any:
    defaults = {"bias": None, "scale": None, "normalize": "softmax", "statistics": None, "key_logits": None}
    return checked_request(query, key, value, **(defaults | options))


def run(query: Tensor, key: Tensor, value: Tensor | None, **options: Any) -> Any:
    request, restore = lowered(checked(query, key, value, **options))
    assert backend.supports(request) is None
    return restore(backend.run(request))


def scaled_error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    assert not found.isnan().any()
    return float((found.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max().clamp_min(1e-3))


def weighted_sum(tensors: list[Tensor]) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return sum((t * torch.randn(t.shape, generator=random).to(t.dtype)).sum() for t in tensors)  # type: ignore[return-value]


def small(problem: Problem) -> Problem:
    """Return the problem with half its heads and few channels: the interpreter is slow."""
    problem = copy.copy(problem)
    for name in ("query", "key", "value"):
        tensor = getattr(problem, name)
        setattr(problem, name, tensor[:, : max(1, tensor.shape[1] // 2), :, :20])
    heads = problem.query.shape[1]
    if problem.bias == "relative":
        problem.factors = {name: factor[:heads] for name, factor in problem.factors.items()}
    elif problem.bias == "decoupled":
        tables = problem.factors.items()
        problem.factors = {name: (f[:heads] if f.ndim == 3 else f)[..., :20] for name, f in tables}
    return problem


@pytest.mark.parametrize(("where", "bias"), CASES, ids=str)
def test_like_the_textbook(where: str, bias: str) -> None:
    problem = small(problem_of(Case(where, bias, "fp32", 1)))
    leaves, exact_leaves = problem.leaves(torch.float32), problem.leaves(torch.float64)
    options = problem.options(leaves) | {"statistics": StatisticsRequest(lse=True)}
    answer = run(leaves["query"], leaves["key"], leaves["value"], **options)
    exact = problem.textbook(exact_leaves)
    assert exact.lse is not None
    found = [answer.output, answer.statistics.lse]
    expected = [exact.output, exact.lse]
    found += torch.autograd.grad(weighted_sum(found), list(leaves.values()))
    expected += torch.autograd.grad(weighted_sum(expected), list(exact_leaves.values()))
    for name, mine, right in zip(["output", "lse", *leaves], found, expected, strict=True):
        assert scaled_error(mine, right) < 1e-5, name


@pytest.mark.parametrize("name", ["op1d_dilated_causal", "op2d_blocked", "op3d", "op2d_bf16"])
def test_like_natten(name: str) -> None:
    tensors, options = golden(name)
    query, key, value = (tensors[f"in.{what}"] for what in ("query", "key", "value"))
    grid, half = tuple(query.shape[1:-2]), query.dtype == torch.bfloat16
    pattern = Neighborhood(
        grid,
        options.pop("kernel_size"),
        stride=options.pop("stride", 1),
        dilation=options.pop("dilation", 1),
        causal=options.pop("is_causal", False),
    )
    assert not options
    leaves = [by_head(tensor).requires_grad_() for tensor in (query, key, value)]
    answer = run(*leaves, pattern=pattern, statistics=StatisticsRequest(lse=True))
    assert scaled_error(answer.output, by_head(tensors["out.output"]).double()) < (2e-2 if half else 1e-5)
    assert scaled_error(answer.statistics.lse, by_head(tensors["out.logsumexp"][..., None])[..., 0].double()) < 1e-5
    if not half:
        grads = torch.autograd.grad(answer.output, leaves, by_head(tensors["in.grad_output"]))
        for what, grad in zip(("query", "key", "value"), grads, strict=True):
            assert scaled_error(grad, by_head(tensors[f"grad.{what}"]).double()) < 1e-5, what


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, json.loads(file.metadata()["kwargs"])


def by_head(tensor: Tensor) -> Tensor:
    """Return (B, L_1, .., L_n, H, D) as (B, H, N, D), without a copy."""
    return tensor.flatten(1, -3).transpose(1, 2)


def test_half_precision_is_as_good_as_eager_half_precision() -> None:
    problem = small(problem_of(Case("na2d", "relative", "bf16", 1)))
    leaves, eager, exact = (problem.leaves(dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float64))
    answer = run(leaves["query"], leaves["key"], leaves["value"], **problem.options(leaves))
    outputs = [answer.output, problem.textbook(eager).output, problem.textbook(exact).output]
    found, plain, right = (
        [output, *torch.autograd.grad(weighted_sum([output]), list(each.values()))]
        for output, each in zip(outputs, (leaves, eager, exact), strict=True)
    )
    for name, mine, theirs, expected in zip(["output", *leaves], found, plain, right, strict=True):
        assert mine.dtype == torch.bfloat16, name
        assert scaled_error(mine, expected) <= 2 * scaled_error(theirs, expected), name


def test_prefix_tokens_and_zero_keys() -> None:
    problem = small(problem_of(Case("halo_zero+prefix", "none", "fp32", 1)))
    given = (problem.query, problem.key, problem.value)
    exact = attend(*(tensor.double() for tensor in given), pattern=problem.pattern, backend="reference")
    assert scaled_error(run(*given, pattern=problem.pattern).output, exact) < 1e-5


def test_queries_that_see_nothing() -> None:
    pattern = Neighborhood(7, 3)
    query, key, value = (torch.randn(2, 1, 7, 8).requires_grad_() for _ in range(3))
    key_logits = torch.zeros(2, 7)
    key_logits[0, :4] = -torch.inf  # hides all keys of the first two queries of the first sample
    key_logits.requires_grad_()
    wanted = StatisticsRequest(lse=True, rows=(0, -1), output_norm=True)
    answer = run(query, key, value, pattern=pattern, key_logits=key_logits, statistics=wanted)
    assert (answer.output[0, :, :2] == 0).all()
    assert (answer.statistics.lse[0, :, :2] == -torch.inf).all()
    assert answer.statistics.lse[1].isfinite().all()
    assert torch.equal(answer.statistics.output_norm, answer.output.norm(dim=-1))
    assert torch.equal(answer.statistics.rows[0, 0, 0], torch.zeros(7))
    grads = torch.autograd.grad(answer.output.sum(), (query, key, value, key_logits))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0, :, :2] == 0).all()
    assert (grads[1][0, :, :4] == 0).all()


def test_log_sum_exp_without_a_value() -> None:
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    options = {"pattern": Window((3, 3), 2, 1, prefix=3), "statistics": StatisticsRequest(lse=True)}
    alone = run(query, key, None, **options)
    assert alone.output is None
    assert torch.equal(alone.statistics.lse, run(query, key, value, **options).statistics.lse)


def refuse(width: int = 8, grad: bool = False, **options: Any) -> str | None:
    query = torch.zeros(1, 2, 5, width, requires_grad=grad)
    return backend.supports(checked(query, query, query, pattern=Neighborhood(5, 3), **options))


def test_reasons() -> None:
    assert refuse() is None
    assert refuse(normalize="sigmoid") == "has no sigmoid attention on a grid"
    assert refuse(bias=torch.zeros(5, 5)) == "has no dense bias on a grid"
    assert (
        refuse(statistics=StatisticsRequest(entropy=True, received=True))
        == "has no kernel for received, entropy on a grid"
    )
    assert refuse(width=257) == "has kernels for head_dim up to 256, this is 257"
    assert refuse(width=80) is None
    assert refuse(width=80, grad=True) == "has float32 gradients for head_dim up to 64, this is 80"
    wide = RelativeBias(torch.zeros(2, 5, dtype=torch.float64))
    assert refuse(bias=wide) == "has no float64 kernels, and the additive logits are float64"


def test_atomic_additions_are_refused_where_results_have_to_repeat() -> None:
    table = torch.zeros(2, 5, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert refuse(bias=RelativeBias(table.detach()), grad=True) is None
        assert "torch.use_deterministic_algorithms" in str(refuse(bias=RelativeBias(table)))
    finally:
        torch.use_deterministic_algorithms(False)


@st.composite
def patterns(draw: st.DrawFn) -> Any:
    grid = tuple(draw(st.lists(st.integers(2, 7), min_size=1, max_size=3)))
    kind = draw(st.sampled_from(["neighborhood", "blocked", "window"]))
    if kind == "neighborhood":
        window = tuple(draw(st.integers(1, size)) for size in grid)
        return Neighborhood(
            grid,
            window,
            stride=tuple(draw(st.integers(1, wide)) for wide in window),
            dilation=tuple(draw(st.integers(1, size // wide)) for size, wide in zip(grid, window, strict=True)),
            causal=tuple(draw(st.booleans()) for _ in grid),
            border=draw(st.sampled_from(["shift", "mask"])),
        )
    window = tuple(draw(st.integers(1, size)) for size in grid)
    if kind == "window":
        return Window(grid, window, tuple(draw(st.integers(0, wide - 1)) for wide in window))
    halo = tuple(draw(st.integers(0, 2)) for _ in grid)
    if all(size % wide == 0 for size, wide in zip(grid, window, strict=True)) and draw(st.booleans()):
        return Blocked(grid, window, halo, border="zero", padded=True)
    return Blocked(grid, window, halo)


@given(patterns(), st.sampled_from([1, 4, 16]), st.booleans())
@settings(max_examples=60)
def test_tiles_hold_every_pair_once(pattern: Any, tokens: int, of_keys: bool) -> None:
    num_queries, num_keys = math.prod(pattern.query_grid), math.prod(padded_grid(pattern))
    shape = geometry(pattern, CPU)
    tiles = (key_tiles if of_keys else query_tiles)(pattern, TileConfig(tokens, 16, 4, 1), CPU)
    pairs: Counter[tuple[int, int]] = Counter()
    met: Counter[int] = Counter()
    for row in tiles.table.tolist():
        span_rows, query_counts, first_keys, key_counts, first_query, first_key = (
            *(row[i : i + 3] for i in (0, 3, 6, 9)),
            *row[12:14],
        )
        own = key_counts if of_keys else query_counts
        assert 1 <= math.prod(own) <= min(tokens, tiles.size)
        queries, keys = list(boxes(query_counts)), list(boxes(key_counts))
        query_token = {q: first_query + dot(q, shape.query_steps) for q in queries}
        key_token = {k: first_key + dot(k, shape.key_steps) for k in keys}
        met.update((key_token if of_keys else query_token).values())
        for q, k in product(queries, keys):
            spans = [shape.spans[span_rows[axis] + q[axis]].tolist() for axis in range(3)]
            seen = all(spans[axis][0] <= first_keys[axis] + k[axis] <= spans[axis][1] for axis in range(3))
            assert seen or tiles.masked
            if seen:
                pairs[query_token[q], key_token[k]] += 1
    assert set(met.values()) == {1}
    assert len(met) == (num_keys if of_keys else num_queries)
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    allowed = pattern.mask(position, torch.arange(num_keys)[None])
    assert pairs == Counter(map(tuple, allowed.nonzero().tolist()))


def boxes(counts: list[int]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, counts))


def dot(place: tuple[int, ...], steps: tuple[int, ...]) -> int:
    return sum(p * s for p, s in zip(place, steps, strict=True))


def test_blocks_and_windows_need_no_mask() -> None:
    for pattern in (Blocked((16, 16), 8, 4), Window((14, 21), 7), Neighborhood((16, 16), 8, stride=8)):
        assert not query_tiles(pattern, TileConfig(64, 64, 4, 1), CPU).masked, pattern
    assert query_tiles(Neighborhood((16, 16), 7), TileConfig(64, 64, 4, 1), CPU).masked
