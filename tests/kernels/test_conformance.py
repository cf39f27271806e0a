"""Every backend, pattern, bias, normalisation, dtype and statistic against the textbook in float64; gradients too.

A result may not err more than twice what the same-precision plain computation errs, both measured against float64.
Memory that nobody has written is NaN here. A combination is skipped only where the backend says why it cannot run it,
which ``torch`` and ``reference`` never may. ``VISLM_TEST_DEVICE=cuda`` runs the suite on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from attention_cases import BIASES, CASES, DTYPES, Case, Problem, biases_at, pairs, problem_of, statistics_of
from attention_textbook import measure
from torch import Tensor

from vislm.errors import BackendUnavailable, UsageError
from vislm.kernels import BACKENDS, Attended, Neighborhood, Statistics, StatisticsRequest, attend

COMPLETE = ("torch", "reference")
RANKED = ("low_rank", "headwise")
DEVICE = torch.device(os.environ.get("VISLM_TEST_DEVICE", "cpu"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),  # by NATTEN on a CPU
    pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning"),
]
# The others need a GPU (or NATTEN): without one they would only fill the report with skips.
RUNNABLE = [
    name
    for name in BACKENDS
    if DEVICE.type != "cpu" or name in ("flex", "torch", "reference") or (name == "natten" and find_spec("natten"))
]
every_backend = pytest.mark.parametrize("backend", RUNNABLE)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(DEVICE.type == "cpu")  # on GPUs not every gradient is deterministic
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def flex_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention's definition as it is: tracing each combination first takes most of a second."""
    from torch.nn.attention import flex_attention

    if DEVICE.type != "cpu":
        return
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("vislm.kernels.backends.flex.call.compiled", lambda device: flex_attention.flex_attention)


def error(result: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values (1 if all are 0); infinities must agree."""
    result, exact = result.detach().double(), exact.detach()
    finite = exact.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert torch.equal(result[~finite], exact[~finite].double())
    if not finite.any():
        return 0.0
    scale = float(exact[finite].square().mean().sqrt()) or 1.0
    return float((result[finite] - exact[finite]).square().mean().sqrt()) / scale


def check(name: str, found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    # In float64 the plain computation is the exact one, so that only the allowance is left.
    allowance = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    assert found.shape == exact.shape, name
    mine, allowed = error(found, exact), 2 * error(plain, exact) + allowance
    assert mine <= allowed, f"{name} errs {mine:.2e}, at most {allowed:.2e} is allowed"


def run(backend: str, case: Case, problem: Problem, given: dict[str, Tensor]) -> tuple[Attended, int]:
    """Return what the backend gives for the first of :func:`requests_of` that it can run, and which one that is.

    Skips the test where there is none.
    """
    given = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    inputs, options = (given["query"], given["key"], given["value"]), problem.options(given)
    reason = ""
    for number, wanted in enumerate(requests_of(case)):
        try:
            return attend(*inputs, statistics=on_device(wanted), backend=backend, **options), number
        except BackendUnavailable as refusal:
            reason = str(refusal).partition("cannot run this call: ")[2]
    assert backend not in COMPLETE, reason
    runs_in_flex = DEVICE.type == "cpu" and case.normalize == "softmax" and not torch.is_grad_enabled()
    assert backend != "flex" or not runs_in_flex, reason
    pytest.skip(reason)


def on_device(wanted: StatisticsRequest) -> StatisticsRequest:
    received, mass = wanted.received, wanted.mass
    return replace(
        wanted,
        received=received.to(DEVICE) if isinstance(received, Tensor) else received,
        mass=None if mass is None else {name: group.to(DEVICE) for name, group in mass.items()},
    )


def requests_of(case: Case) -> list[StatisticsRequest]:
    """Return requests for everything, and for what kernels of other packages give."""
    problem = problem_of(case)
    everything = statistics_of(case, problem.query.shape[2], problem.key.shape[2])
    return [everything, StatisticsRequest(lse=everything.lse, output_norm=True), StatisticsRequest()]


def tensors_of(statistics: Statistics) -> dict[str, Tensor]:
    fields = {name: entry for name, entry in vars(statistics).items() if isinstance(entry, Tensor)}
    fields |= {f"mass.{name}": entry for name, entry in (statistics.mass or {}).items()}
    return {name: entry.cpu() for name, entry in fields.items()}


def kind_of_weights(case: Case) -> str:
    """Softmax over a zero border leaves a part of each row to zero keys."""
    return "simplex" if case.normalize == "softmax" and "zero" not in case.where else "unnormalised"


def test_the_table_has_every_pair() -> None:
    """Of pattern, bias, dtype and batch size."""
    rows = [case for case in CASES if case.normalize == "softmax"]
    wanted = {
        pair
        for case in rows
        for bias in biases_at(case.where)
        for dtype in DTYPES
        for batch in (1, 3)
        for pair in pairs(Case(case.where, bias, dtype, batch))
    }
    assert wanted == {pair for case in rows for pair in pairs(case)}
    assert {case.bias for case in rows} == set(BIASES)


@every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_statistics(backend: str, case: Case) -> None:
    problem, dtype = problem_of(case), DTYPES[case.dtype]
    with torch.no_grad():
        result, number = run(backend, case, problem, problem.leaves(dtype))
    exact, plain = by_textbook(case, number)
    assert result.output.dtype == dtype
    assert result.statistics.weights == kind_of_weights(case)
    check("output", result.output.cpu(), plain["output"], exact["output"], dtype)
    statistics = tensors_of(result.statistics)
    assert {"output", *statistics} == exact.keys()
    for name in statistics:
        entry = exact[name]
        assert statistics[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        check(name, statistics[name], plain[name], entry, dtype)
        # Statistics are float32 arithmetic whatever the inputs, except of outputs and of channels that hold a bias.
        if name != "output_norm" and case.bias not in RANKED:
            assert error(statistics[name], entry) <= 1e-5, name


@every_backend
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "fp16"], ids=str)
def test_gradients(backend: str, case: Case) -> None:
    """Of query, key, value, biases, tables and factors, through the output and, where there are any, the statistics."""
    problem, dtype = problem_of(case), DTYPES[case.dtype]
    given = problem.leaves(dtype)
    result, number = run(backend, case, problem, given)
    found = gradients({"output": result.output.cpu(), **tensors_of(result.statistics)}, given)
    exact, plain = gradients_by_textbook(case, number)
    for name, entry in exact.items():
        assert found[name].dtype == dtype, name
        check(name, found[name], plain[name], entry, dtype)


def gradients(results: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random combination of all results."""
    random = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for _, entry in sorted(results.items()):
        weight = torch.randn(entry.shape, generator=random, dtype=torch.float64).to(entry.dtype)
        total = total + (entry.masked_fill(entry.isinf(), 0.0) * weight).sum().double()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def results_by_textbook(case: Case, number: int, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    problem = problem_of(case)
    result = problem.textbook(leaves)
    return {"output": result.output, **measure(requests_of(case)[number], result, problem.layout)}


@lru_cache(maxsize=4)  # the backends take turns, and all want the same
def by_textbook(case: Case, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the output and the statistics of a request, exactly and by the plain computation in the case's dtype."""
    kinds = torch.float64, DTYPES[case.dtype]
    with torch.no_grad():
        exact, plain = (results_by_textbook(case, number, problem_of(case).leaves(kind)) for kind in kinds)
    return exact, plain


@lru_cache(maxsize=4)
def gradients_by_textbook(case: Case, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same for the gradients."""
    leaves = [problem_of(case).leaves(kind) for kind in (torch.float64, DTYPES[case.dtype])]
    exact, plain = (gradients(results_by_textbook(case, number, mine), mine) for mine in leaves)
    return exact, plain


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("where", sorted({case.where for case in CASES if case.batch == 3 and case.bias == "none"}))
def test_batch_equals_stacked_singles(backend: str, where: str) -> None:
    problem = problem_of(Case(where, "none", "fp32", 3))
    together = attend(problem.query, problem.key, problem.value, pattern=problem.pattern, backend=backend)
    for index in range(3):
        one = slice(index, index + 1)
        alone = attend(
            problem.query[one], problem.key[one], problem.value[one], pattern=problem.sample(index), backend=backend
        )
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["causal/self", "padded/self", "padded_causal/cross", "masked/self", "na2d+prefix"])
def test_tiles_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide the number of queries give the same numbers."""
    monkeypatch.setattr("vislm.kernels.rows.MAX_ROWS", 10)
    monkeypatch.setattr("vislm.kernels.sweep.MAX_ROWS", 10)
    monkeypatch.setattr("vislm.kernels.fused.MAX_MASK_ELEMENTS", 11 * 63)
    test_output_and_statistics("torch", Case(name, "dense", "fp32", 3))
    test_gradients("torch", Case(name, "dense", "fp32", 3))


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("shape", [(), (1, 24, 1), (4, 1, 1)], ids=str)
def test_a_bias_shared_by_all_keys_leaves_zero_keys_alone(backend: str, shape: tuple[int, ...]) -> None:
    problem = problem_of(Case("halo_zero", "none", "fp64", 1))
    inputs = problem.query, problem.key, problem.value
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared, spread = (
        attend(*inputs, pattern=problem.pattern, bias=given, backend=backend)
        for given in (bias, bias.expand(4, 24, 24).clone())
    )
    torch.testing.assert_close(shared, spread)
    assert (shared - attend(*inputs, pattern=problem.pattern, backend=backend)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("grid", "window", "dilation", "message"),
    [
        (
            (5, 9),
            6,
            1,
            r"window 6 x dilation 1 = 6 is larger than axis 0 of the grid \(5, 9\); use a window of at most 5",
        ),
        ((5, 9), (3, 5), 2, r"window 3 x dilation 2 = 6 is larger than axis 0 .* use a window of at most 2"),
        ((7,), 8, 1, r"window 8 x dilation 1 = 8 is larger than axis 0 of the grid \(7,\)"),
        ((3, 4, 5), (3, 4, 6), 1, r"window 6 .* larger than axis 2 of the grid \(3, 4, 5\)"),
    ],
)
def test_a_window_larger_than_the_grid(grid, window, dilation, message) -> None:
    with pytest.raises(UsageError, match=message):
        Neighborhood(grid, window, dilation=dilation)
