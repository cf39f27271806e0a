"""Every backend, pattern, dtype and shape against the textbook in float64.

A result may not err more than twice what the same-precision eager computation errs, both measured against float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vislm.kernels import BACKENDS, Masked, Padded, attend

PATTERNS = ("dense", "causal", "padded", "padded_causal", "masked")
SHAPES = {
    "self": {"tokens": (63, 63)},
    "cross": {"tokens": (17, 63)},
    "more_queries": {"tokens": (63, 17)},
    "decode": {"tokens": (1, 63)},
    "mha_dv": {"heads": (2, 2), "dims": (48, 24)},
}


def error(result: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values; infinities must agree."""
    result, finite = result.double(), exact.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert torch.equal(result[~finite], exact[~finite])
    scale = exact[finite].square().mean().sqrt()
    return float((result[finite] - exact[finite]).square().mean().sqrt() / scale) if scale > 0 else 0.0


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("batch", [1, 3], ids="batch{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_statistics(
    backend, pattern, shape, dtype, batch, extras, make, plain, everything, measure, flatten
) -> None:
    problem = make(pattern, batch=batch, extras=extras, dtype=dtype, **SHAPES[shape])
    wanted = everything(batch, problem.query.shape[2], problem.key.shape[2])
    result = attend(*problem.tensors, statistics=wanted, backend=backend, **problem.options)

    exact, weights, lse = plain(problem.to(torch.float64))
    eager = plain(problem)
    assert result.output.dtype == dtype
    assert result.statistics.weights == "simplex"
    allowance = 4 * torch.finfo(torch.float32).eps
    assert error(result.output, exact) <= 2 * error(eager[0], exact) + allowance

    exact_statistics = measure(wanted, exact, weights, lse)
    eager_statistics = measure(wanted, *eager)
    statistics = flatten(result.statistics)
    assert statistics.keys() == exact_statistics.keys()
    for name, expected in exact_statistics.items():
        assert statistics[name].dtype == torch.float32, name
        assert statistics[name].shape == expected.shape, name
        assert error(statistics[name], expected) <= 2 * error(eager_statistics[name], expected) + allowance, name
        if name != "output_norm":  # the other statistics are float32 arithmetic, whatever the dtype of the inputs
            assert error(statistics[name], expected) <= 1e-5, name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays_float64(backend, pattern, make, plain, everything, measure, flatten) -> None:
    problem = make(pattern, extras=True, dtype=torch.float64)
    wanted = everything(2, 63, 63)
    result = attend(*problem.tensors, statistics=wanted, backend=backend, **problem.options)
    exact = plain(problem)
    torch.testing.assert_close(result.output, exact[0], rtol=1e-12, atol=1e-12)
    for name, expected in measure(wanted, *exact).items():
        torch.testing.assert_close(flatten(result.statistics)[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_equals_stacked_singles(backend, pattern, make) -> None:
    problem = make(pattern, batch=3)
    pattern = problem.options["pattern"]
    together = attend(*problem.tensors, pattern=pattern, backend=backend)
    for index in range(3):
        if isinstance(pattern, Padded):
            alone = Padded(pattern.valid[index : index + 1], causal=pattern.causal)
        else:
            alone = Masked(pattern.allowed[index : index + 1]) if isinstance(pattern, Masked) else pattern
        single = attend(*problem.sample(index), pattern=alone, backend=backend)
        torch.testing.assert_close(together[index : index + 1], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["causal", "padded", "padded_causal", "masked"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_do_not_show(backend, pattern, make, plain, everything, measure, flatten, monkeypatch) -> None:
    """Tiles that do not divide the number of queries give the same numbers."""
    monkeypatch.setattr("vislm.kernels.rows.MAX_ROWS", 10)
    monkeypatch.setattr("vislm.kernels.fused.MAX_MASK_ELEMENTS", 11 * 63)
    problem = make(pattern, extras=True)
    wanted = everything(2, 63, 63)
    result = attend(*problem.tensors, statistics=wanted, backend=backend, **problem.options)
    output, weights, lse = plain(problem.to(torch.float64))
    torch.testing.assert_close(result.output.double(), output, rtol=1e-4, atol=1e-5)
    for name, expected in measure(wanted, output, weights, lse).items():
        torch.testing.assert_close(flatten(result.statistics)[name].double(), expected, rtol=1e-4, atol=1e-5)
