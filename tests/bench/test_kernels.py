"""The benchmark of local attention: its peers compute what they claim, and its figures mean what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from vislm.bench.kernels import rows as kernels_rows
from vislm.bench.kernels import timing as kernels_timing
from vislm.bench.kernels.cases import (
    PATTERNS,
    PEERS,
    Case,
    Setting,
    Skip,
    allowed_pairs,
    inputs_of,
    our_cases,
    pattern_of,
)
from vislm.bench.kernels.memory import peak_memory, resident_peak
from vislm.bench.kernels.plan import calls_of, cases_of
from vislm.bench.kernels.plot import plot_rows
from vislm.bench.kernels.rows import Row, measure, slopes
from vislm.bench.kernels.run import GRIDS, Bench, kernel_lines, machine
from vislm.bench.kernels.statistics import EAGER, RECEIVED, SDPA, statistics_setting
from vislm.bench.kernels.timing import interleaved, matmul_rate
from vislm.errors import UnknownName, UsageError
from vislm.kernels import attend

UNCOMPILED = tuple(name for name in PEERS if name != "flex")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def setting(pattern: str, **changes) -> Setting:
    small = Setting(pattern, (8, 12), window=4, heads=2, head_dim=8, threads=1, peers=UNCOMPILED)
    return replace(small, **changes)


def expected(problem: Setting) -> torch.Tensor:
    query, key, value = inputs_of(problem)
    return attend(query, key, value, pattern=pattern_of(problem), backend="reference")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_peers_compute_the_pattern(pattern) -> None:
    problem = setting(pattern)
    cases = {case.name: case for case in cases_of(problem) if isinstance(case, Case)}
    assert {"SDPA, boolean mask", "gather per query", "eager softmax, mask", "vislm (torch)"} <= set(cases)
    for name, case in cases.items():
        output = case.heads_first(case.call(*case.inputs))
        reference = expected(problem) if "HaloAttn" not in name else first_output(cases, "vislm as HaloAttn (torch)")
        torch.testing.assert_close(output, reference, atol=2e-6, rtol=1e-5)
        assert case.against is None or cases[case.against].against is None


def first_output(cases, name):
    return cases[name].call(*cases[name].inputs)


def test_timms_layer_is_compared_where_blocks_fit() -> None:
    names = {case.name for case in cases_of(setting("halo"))}
    assert {"vislm as HaloAttn (torch)", "timm HaloAttn"} <= names
    assert "timm HaloAttn" not in {case.name for case in cases_of(setting("halo", grid=(9, 12)))}
    assert "timm HaloAttn" not in {case.name for case in cases_of(setting("window"))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_flex_attention_computes_the_pattern() -> None:
    problem = setting("neighborhood", peers=("flex",))
    (flex,) = [case for case in cases_of(problem) if case.name == "FlexAttention, compiled"]
    assert isinstance(flex, Case)
    torch.testing.assert_close(flex.call(*flex.inputs), expected(problem), atol=2e-6, rtol=1e-5)
    assert "no backward" in str(flex.no_backward)


def test_gradients_of_all_inputs_are_made() -> None:
    cases = [case for case in cases_of(setting("halo")) if isinstance(case, Case)]
    for name, call in calls_of(cases, "training").items():
        gradients = call()
        assert all(gradient.abs().sum() > 0 for gradient in gradients), name
        assert len(gradients) == (5 if name.startswith("vislm as") else 4 if name.startswith("timm") else 3)


def test_no_gradients_are_prepared_in_inference() -> None:
    (case,) = [case for case in our_cases(setting("window")) if isinstance(case, Case)]
    assert not calls_of([case], "forward")[case.name]().requires_grad
    assert calls_of([replace(case, no_backward="none")], "training") == {}


def test_peers_that_do_not_fit_are_skipped_with_the_sizes() -> None:
    large = setting("neighborhood", grid=(224, 224), window=7, memory_limit=1 << 30, peers=("sdpa", "eager", "gather"))
    reasons = {case.name: case.reason for case in cases_of(large) if isinstance(case, Skip)}
    assert reasons["SDPA, boolean mask"] == (
        "the N x N mask, boolean and additive need 11.7 GiB, the limit is 1.00 GiB"
    )
    assert {"eager softmax, mask"} < set(reasons)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_allowed_pairs(pattern) -> None:
    problem = setting(pattern)
    position = torch.arange(problem.tokens)
    assert allowed_pairs(pattern_of(problem)) == int(pattern_of(problem).mask(position[:, None], position[None]).sum())


def test_calls_take_turns_after_warming_up(monkeypatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(kernels_timing.time, "perf_counter", lambda: now[0])
    durations = {"a": iter([100.0, 1.0, 3.0, 2.0]), "b": iter([100.0, 5.0, 7.0, 6.0])}

    def call(name: str) -> None:
        order.append(name)
        now[0] += next(durations[name])

    calls = {name: lambda name=name: call(name) for name in durations}
    assert interleaved(calls, rounds=3, budget=1e9) == {"a": [1.0, 3.0, 2.0], "b": [5.0, 7.0, 6.0]}
    assert order == ["a", "b"] * 4


def test_no_round_starts_after_the_budget(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(kernels_timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 10.0

    assert interleaved({"slow": call}, rounds=100, budget=25.0) == {"slow": [10.0, 10.0, 10.0]}
    assert now[0] == 40.0  # one to warm up, three rounds


def test_matmul_rate_counts_multiplications_and_additions() -> None:
    assert matmul_rate(1.0) == 2 * kernels_timing.matmul_call("cpu", torch.float32)().shape[0] ** 3


@LINUX
def test_peak_memory_of_a_call_is_what_it_allocates() -> None:
    def call() -> torch.Tensor:
        held = torch.ones(24 << 20, dtype=torch.uint8)
        return held + held.float().sum().byte()  # 24 MiB held, 96 MiB for a while, 24 MiB returned

    assert resident_peak(call) == pytest.approx(120 << 20, rel=0.05)
    assert resident_peak(lambda: None) < 1 << 20


@LINUX
def test_peaks_come_from_a_fresh_process() -> None:
    problem = setting("neighborhood", grid=(28, 28), peers=("sdpa", "eager"))
    peaks = peak_memory(problem)
    assert set(peaks) == {"vislm (torch)", "SDPA, boolean mask", "eager softmax, mask"}
    matrix = problem.heads * problem.tokens**2 * 4
    assert peaks["eager softmax, mask"]["forward"] > 1.8 * matrix
    assert peaks["SDPA, boolean mask"]["forward"] > problem.tokens**2


def test_a_process_that_dies_leaves_no_figures() -> None:
    assert peak_memory(setting("neighborhood", device="nowhere")) == {}


def test_rows_of_a_setting() -> None:
    measured = measure(setting("neighborhood", peers=("sdpa",)), runs=1, budget=1.0, memory=False)
    assert [(row.case, row.direction) for row in measured.rows] == [
        ("vislm (torch)", "forward"),
        ("SDPA, boolean mask", "forward"),
        ("vislm (torch)", "training"),
        ("SDPA, boolean mask", "training"),
    ]
    ours, peer, training, _ = measured.rows
    assert peer.time_ratio == pytest.approx(peer.seconds / ours.seconds)
    assert peer.difference is not None
    assert peer.difference < 1e-5
    flops = 4 * 16 * 96 * 16  # 4 x keys x tokens x channels
    assert ours.flops_per_second * ours.seconds == pytest.approx(flops)
    assert training.flops_per_second * training.seconds == pytest.approx(3 * flops)
    assert (ours.time_ratio, ours.peak, ours.difference) == (None, None, None)


def test_a_peer_that_fails_is_skipped_with_its_reason(monkeypatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nand a long traceback")

    def cases(problem: Setting):
        for case in cases_of(problem):
            yield replace(case, call=broken) if case.name == "SDPA, boolean mask" and isinstance(case, Case) else case

    monkeypatch.setattr(kernels_rows, "cases_of", cases)
    measured = measure(setting("window", peers=("sdpa", "eager")), runs=1, budget=1.0, memory=False)
    assert Skip("SDPA, boolean mask", "RuntimeError: no compiler") in measured.skipped
    assert {row.case for row in measured.rows} == {"vislm (torch)", "eager softmax, mask"}


def test_a_failure_of_ours_is_an_error(monkeypatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug")

    ours = Case("vislm (torch)", (), broken)
    monkeypatch.setattr(kernels_rows, "cases_of", lambda problem: [ours])
    with pytest.raises(RuntimeError, match="a bug"):
        measure(setting("window"), runs=1, budget=1.0, memory=False)


def row(**changes) -> Row:
    values = {
        "pattern": "neighborhood", "grid": (8, 8), "tokens": 64, "case": "vislm (torch)", "against": None,
        "direction": "forward", "seconds": 1.0, "fastest": 1.0, "time_ratio": None, "peak": None, "memory_ratio": None,
        "flops_per_second": 1.0, "matmul_share": 0.1, "difference": None,
    }  # fmt: skip
    return Row(**(values | changes))


def test_slope_of_time_over_tokens() -> None:
    rows = [row(tokens=tokens, seconds=3e-9 * tokens**1.5) for tokens in (100, 400, 1600)]
    rows += [row(tokens=tokens, case="SDPA, boolean mask", against="vislm (torch)") for tokens in (100, 400)]
    rows += [row(pattern="window")]
    fitted = slopes(rows)
    assert set(fitted) == {"neighborhood, vislm (torch), forward"}
    assert fitted["neighborhood, vislm (torch), forward"] == pytest.approx(1.5)


def test_plot_without_memory_or_training(tmp_path) -> None:
    rows = [row(tokens=64), row(tokens=256, grid=(16, 16)), row(case="timm HaloAttn", against="vislm (torch)")]
    assert plot_rows(rows, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_are_measured_too() -> None:
    problem = replace(statistics_setting(setting("window"), 40), heads=2, head_dim=8)
    cases = {case.name: case for case in cases_of(problem) if isinstance(case, Case)}
    assert {SDPA, EAGER, RECEIVED} <= set(cases)
    for case in cases.values():
        torch.testing.assert_close(case.call(*case.inputs), first_output(cases, SDPA), atol=2e-6, rtol=1e-5)
    assert calls_of(list(cases.values()), "training") == {}


def test_the_whole_benchmark_in_small(tmp_path) -> None:
    bench = Bench(
        grids=((8, 8), (8, 16)), window=4, heads=2, head_dim=8, runs=1, peers=("sdpa", "timm", "natten"),
        memory=False, statistics_tokens=32,
    )  # fmt: skip
    text = "\n".join(kernel_lines(bench, tmp_path))
    assert machine() in text
    assert "outputs agree within" in text
    assert "neighborhood, vislm (torch), forward: " in text
    assert "statistics, 32 tokens, 14 heads x 64" in text
    written = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert {entry["pattern"] for entry in written["rows"]} == {*PATTERNS, "statistics"}
    assert set(written) == {"machine", "bench", "rows", "skipped", "slopes"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(f"kernels_{name}.png" for name in PATTERNS)


def test_defaults_are_the_published_question() -> None:
    assert Bench().grids == GRIDS
    settings = Bench().settings()
    assert len(settings) == 12
    assert Bench().quick().grids == ((14, 14), (28, 28))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patterns": ("neighbourhood",)}, UnknownName, "did you mean 'neighborhood'"),
        ({"peers": ("sdpaa",)}, UnknownName, "did you mean 'sdpa'"),
        ({"dtype": "float"}, UnknownName, "dtype"),
        ({"grids": ((5, 5),)}, UsageError, "larger than axis 0"),
        ({"grids": ()}, UsageError, "at least one grid"),
        ({"patterns": ()}, UsageError, "at least one grid and one pattern"),
    ],
)
def test_mistakes(changes, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message):
        list(kernel_lines(replace(Bench(), **changes), tmp_path))
