"""NATTEN: how a call is put to it, and what it refuses; the real one where it is installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vislm.kernels import Masked, Neighborhood, RelativeBias, StatisticsRequest, Window, attend
from vislm.kernels.backends import natten, reference
from vislm.kernels.checks import checked_request

LSE = StatisticsRequest(lse=True, output_norm=True)
PATTERNS = [
    Neighborhood(23, 5),
    Neighborhood(23, 4, stride=3, causal=True),
    Neighborhood(9, 9),
    Neighborhood((5, 9), (3, 4)),
    Neighborhood((7, 9), 3, dilation=2),
    Neighborhood((5, 9), (5, 9)),
    Neighborhood((3, 4, 5), (2, 3, 3), stride=(1, 2, 3), causal=(True, False, False)),
]


def prefixed(pattern: Neighborhood, prefix: int) -> Neighborhood:
    options = {"stride": pattern.stride, "dilation": pattern.dilation, "causal": pattern.causal}
    return Neighborhood(pattern.grid, pattern.window, **options, prefix=prefix)


def request_of(pattern, *, num_queries=None, head_dim=16, dtype=torch.float32, device="cpu", grad=False, **options):
    count = torch.Size(pattern.grid).numel()
    sizes = (2, 4, count if num_queries is None else num_queries), (2, 2, count + pattern.prefix)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(*size, head_dim, device=device).to(dtype).requires_grad_(grad)
        for size in (sizes[0], *sizes[1:] * 2)
    )
    defaults = {"pattern": pattern, "bias": None, "scale": None, "normalize": "softmax", "statistics": None}
    return checked_request(query, key, value, **(defaults | {"key_logits": None} | options))


@pytest.fixture
def installed(monkeypatch) -> SimpleNamespace:
    """Put a stand-in for NATTEN in its place, whose operator is the reference; returns it and keeps what it gets."""
    calls: list[dict] = []

    def operator(query: Tensor, key: Tensor, value: Tensor, **options):
        calls.append({"query": query, "key": key, "value": value, **options})
        grid, extra = tuple(query.shape[1:-2]), options["additional_keys"]
        prefix = 0 if extra is None else extra.shape[1]
        if prefix:
            key = torch.cat((extra, key.flatten(1, len(grid))), dim=1)
            value = torch.cat((options["additional_values"], value.flatten(1, len(grid))), dim=1)
        else:
            key, value = key.flatten(1, len(grid)), value.flatten(1, len(grid))
        pattern = Neighborhood(
            grid,
            options["kernel_size"],
            stride=options["stride"],
            dilation=options["dilation"],
            causal=options["is_causal"],
            prefix=prefix,
        )
        output, statistics = attend(
            query.flatten(1, len(grid)).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            pattern=pattern,
            scale=options["scale"],
            statistics=StatisticsRequest(lse=True),
            backend="reference",
        )
        back = (tensor.transpose(1, 2).unflatten(1, grid) for tensor in (output, statistics.lse))
        return tuple(back)

    def takes(kind: str):
        def check(query, key, value, *, raise_error, **options) -> bool:
            asked.append((kind, tuple(query.shape), tuple(key.shape), options))
            if kind in stand_in.objections:
                raise NotImplementedError(stand_in.objections[kind])
            return True

        return check

    asked: list[tuple] = []
    kinds = ("can_run_flex_attention", "can_run_cutlass_fna", "can_run_cutlass_fmha")
    backends = SimpleNamespace(**{kind: takes(kind) for kind in kinds})
    module = SimpleNamespace(na1d=operator, na2d=operator, na3d=operator, HAS_LIBNATTEN=True)
    stand_in = SimpleNamespace(calls=calls, asked=asked, objections={}, module=module)
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setitem(sys.modules, "natten.backends", backends)
    monkeypatch.setattr(natten, "_version", lambda: (0, 21))
    return stand_in


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_call(pattern, prefix, installed) -> None:
    request = request_of(prefixed(pattern, prefix), statistics=LSE)
    assert natten.supports(request) is None
    output, statistics = natten.run(request)
    expected = reference.run(request)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close(statistics.lse, expected.statistics.lse)
    torch.testing.assert_close(statistics.output_norm, expected.statistics.output_norm)
    (call,) = installed.calls
    assert call["query"].shape == (2, *pattern.grid, 4, 16)
    assert call["key"].shape == (2, *pattern.grid, 2, 16)
    assert call["query"].is_contiguous()
    assert (call["kernel_size"], call["stride"], call["dilation"], call["is_causal"]) == (
        pattern.window,
        pattern.stride,
        pattern.dilation,
        pattern.causal,
    )
    assert call["scale"] == 0.25
    assert (call["additional_keys"] is None) == (prefix == 0)


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (Neighborhood((5, 9), 3), ["can_run_cutlass_fna"]),
        (Neighborhood((5, 9), 3, prefix=2), ["can_run_cutlass_fna", "can_run_cutlass_fmha"]),
        (Neighborhood((5, 9), (5, 9)), ["can_run_cutlass_fmha"]),
        (Neighborhood((5, 9), (5, 9), prefix=2), ["can_run_cutlass_fmha"]),
        (Neighborhood((5, 9), (5, 9), causal=(True, False)), ["can_run_cutlass_fna"]),
        (Neighborhood(9, 9, causal=True), ["can_run_cutlass_fmha"]),
        (Neighborhood(9, 9, causal=True, prefix=1), ["can_run_cutlass_fna", "can_run_cutlass_fmha"]),
    ],
    ids=str,
)
def test_natten_is_asked_about_each_kernel_that_it_will_use(pattern, kinds, installed, on_pretended_gpu) -> None:
    request = on_pretended_gpu(lambda device: request_of(pattern, device=device, grad=True))
    assert natten.supports(request) is None
    assert [kind for kind, *_ in installed.asked] == kinds
    if kinds[-1] == "can_run_cutlass_fmha":
        assert installed.asked[-1][3] == {"is_causal": pattern == Neighborhood(9, 9, causal=True), "is_varlen": False}
    installed.objections[kinds[-1]] = "too old"
    assert natten.supports(request) == "too old"


def test_reasons_on_a_gpu(installed, on_pretended_gpu, monkeypatch) -> None:
    request = on_pretended_gpu(lambda device: request_of(Neighborhood((5, 9), 3), device=device, grad=True))
    assert natten.only_when_forced(request) is None
    wanted = on_pretended_gpu(
        lambda device: request_of(Neighborhood((5, 9), 3), device=device, grad=True, statistics=LSE)
    )
    assert natten.supports(wanted) == "has no gradient of lse; use torch.no_grad() if none is needed"
    installed.module.HAS_LIBNATTEN = False
    assert natten.supports(request) == "NATTEN is installed without its CUDA library, libnatten"
    monkeypatch.setattr(natten, "_version", lambda: (0, 17))
    assert natten.supports(request) == "needs NATTEN 0.21 or later, this is 0.17"
    monkeypatch.setattr(natten, "_version", lambda: None)
    assert natten.supports(request) == "NATTEN is not installed"


@pytest.mark.parametrize(
    ("pattern", "options", "reason"),
    [
        (Window((5, 9), 3), {}, "runs Neighborhood only, not Window"),
        (Neighborhood((5, 9), 3, border="mask"), {}, "has border='shift' only, not 'mask'"),
        (Neighborhood((5, 9), (3, 1)), {}, "needs windows of 2 or more, these are (3, 1)"),
        (Neighborhood((5, 9), 3, prefix=2), {"num_queries": 47}, "has no queries outside of the grid"),
        (Neighborhood((5, 9), 3), {"bias": RelativeBias(torch.zeros(1, 5, 5))}, "adds no logits"),
        (Neighborhood((5, 9), 3), {"key_logits": torch.zeros(45)}, "adds no logits"),
        (Neighborhood((5, 9), 3), {"scale": 0.0}, "takes scale=0 for the default"),
        (Neighborhood((5, 9), 3), {"normalize": "sigmoid"}, "has softmax only"),
        (
            Neighborhood((5, 9), 3),
            {"statistics": StatisticsRequest(received=True)},
            "measures lse and output_norm only, not received",
        ),
        (Neighborhood((5, 9), 3), {"grad": True}, "has no backward on the CPU"),
        (
            Neighborhood((5, 9), 3),
            {"dtype": torch.bfloat16},
            "is exact for float32 only on the CPU, not torch.bfloat16",
        ),
    ],
)
def test_reasons(pattern, options, reason) -> None:
    """None of these needs NATTEN to be installed, or imports it."""
    assert natten.supports(request_of(pattern, **options)) == reason


def test_other_patterns_and_devices(on_pretended_gpu) -> None:
    masked = request_of(Neighborhood((5, 9), 3))
    masked = checked_request(
        masked.query,
        masked.key,
        masked.value,
        pattern=Masked(torch.ones(45, 45, dtype=torch.bool)),
        bias=None,
        scale=None,
        normalize="softmax",
        statistics=None,
        key_logits=None,
    )
    assert natten.supports(masked) == "runs Neighborhood only, not Masked"
    elsewhere = request_of(Neighborhood((5, 9), 3), device="meta")
    assert natten.supports(elsewhere) == "needs CUDA or CPU tensors, these are on meta"
    assert natten.only_when_forced(masked) == "is FlexAttention without compilation on a CPU"


@pytest.mark.parametrize(
    ("found", "version"), [("0.21.7", (0, 21)), ("0.22.0+torch2110cu130", (0, 22)), ("1.0", (1, 0))]
)
def test_version(found, version, monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert natten._version.__wrapped__() == version


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_installed_package(pattern, prefix) -> None:
    """On a CPU its plain Python runs, by the same arguments as its kernels."""
    pytest.importorskip("natten", reason="NATTEN is not installed")
    request = request_of(prefixed(pattern, prefix), statistics=LSE)
    assert natten.supports(request) is None
    output, statistics = natten.run(request)
    expected = reference.run(request)
    torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.lse, expected.statistics.lse, rtol=1e-5, atol=1e-5)


def test_what_the_installed_package_refuses() -> None:
    pytest.importorskip("natten", reason="NATTEN is not installed")
    assert "powers of two" in natten.supports(request_of(Neighborhood((5, 9), 3), head_dim=48))
    assert "causal" in natten.supports(request_of(Neighborhood(9, 9, causal=True)))
