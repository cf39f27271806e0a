"""Identities of the operator's options."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.kernels import Attended, Causal, Masked, Padded, StatisticsRequest, attend

backends = pytest.mark.parametrize("backend", ["torch", "reference"])


@backends
@pytest.mark.parametrize("shape", [(63,), (2, 63), (2, 4, 63)])
def test_key_logits_are_a_column_of_bias(backend, shape, make) -> None:
    problem = make()
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    column = {1: logits, 2: logits[:, None, None] if len(shape) == 2 else None, 3: logits[..., None, :]}[len(shape)]
    as_keys = attend(*problem.tensors, key_logits=logits, backend=backend)
    torch.testing.assert_close(as_keys, attend(*problem.tensors, bias=column, backend=backend), rtol=1e-5, atol=1e-6)
    assert (as_keys - attend(*problem.tensors, backend=backend)).abs().max() > 0.1


@backends
def test_log_size_makes_one_key_count_as_several(backend, make) -> None:
    """Proportional attention of merged tokens."""
    query, key, value = make(tokens=(5, 3)).tensors
    twice = [0, 1, 1, 2]
    repeated = attend(query, key[:, :, twice], value[:, :, twice], backend=backend)
    sizes = torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(attend(query, key, value, key_logits=sizes.log(), backend=backend), repeated)


@backends
def test_minus_infinity_removes_a_key(backend, make) -> None:
    query, key, value = make(tokens=(5, 9)).tensors
    logits = torch.zeros(9)
    logits[[2, 4]] = -torch.inf
    kept = [0, 1, 3, 5, 6, 7, 8]
    fewer = attend(query, key[:, :, kept], value[:, :, kept], backend=backend)
    torch.testing.assert_close(attend(query, key, value, key_logits=logits, backend=backend), fewer)


@backends
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_head_scale_multiplies_the_outputs(backend, shape, make) -> None:
    problem = make()
    factors = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = attend(*problem.tensors, backend=backend) * factors.expand(2, 4)[..., None, None]
    assert torch.equal(attend(*problem.tensors, head_scale=factors, backend=backend), expected)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_options_do_not_change_the_dtype(backend, dtype, make) -> None:
    problem = make(dtype=dtype)
    options = {"head_scale": torch.ones(4), "bias": torch.zeros(63, 63), "key_logits": torch.zeros(63)}
    assert attend(*problem.tensors, backend=backend, **options).dtype == dtype


@backends
def test_float32_bias_is_not_rounded_to_half_precision(backend, make, plain) -> None:
    """Keys told apart by less than a bfloat16 step of the bias."""
    query, key = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    value = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    bias = torch.tensor([1000.0, 1001.0])  # the nearest bfloat16 of both is 1000
    expected = torch.sigmoid(torch.tensor(1.0)).bfloat16()
    assert attend(query, key, value, bias=bias, backend=backend).item() == expected.item()


@backends
@pytest.mark.parametrize("shape", [(), (63,), (63, 1), (4, 1, 63), (2, 1, 63, 63), (2, 4, 63, 63), (1, 1, 1, 1)])
def test_bias_broadcasts(backend, shape, make, everything, flatten) -> None:
    """In the output and in the statistics, rows chosen per sample included."""
    problem = make("padded_causal")
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = dataclasses.replace(everything(2, 63, 63), rows=torch.tensor([[0, 9], [62, 1]]))
    options = problem.options | {"statistics": wanted, "backend": backend}
    found = attend(*problem.tensors, bias=bias, **options)
    whole = attend(*problem.tensors, bias=bias.expand(2, 4, 63, 63).clone(), **options)
    torch.testing.assert_close(found.output, whole.output)
    expected = flatten(whole.statistics)
    for name, tensor in flatten(found.statistics).items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_operator_traces_as_one_graph(make) -> None:
    """As torch.compile and torch.export need it."""
    problem = make("causal")

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            wanted = StatisticsRequest(lse=True, rows=(-1,), received=True)
            result = attend(query, key, value, pattern=Causal(), statistics=wanted)
            return result.output, result.statistics.lse, result.statistics.rows, result.statistics.received

    exported = torch.export.export(Model(), problem.tensors).module()
    torch.testing.assert_close(exported(*problem.tensors), Model()(*problem.tensors))


@backends
def test_scale_replaces_the_default(backend, make) -> None:
    query, key, value = make().tensors
    torch.testing.assert_close(
        attend(query, key, value, scale=0.5, backend=backend),
        attend(query * 0.5 * 48**0.5, key, value, backend=backend),
        rtol=1e-4,
        atol=1e-5,
    )
    flat = attend(query, key, value, scale=0, backend=backend)
    torch.testing.assert_close(flat, value.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(flat))


@backends
def test_grouped_heads_equal_repeated_keys(backend, make) -> None:
    query, key, value = make(heads=(6, 2)).tensors
    repeated = attend(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), backend=backend)
    torch.testing.assert_close(attend(query, key, value, backend=backend), repeated)


@backends
def test_equal_patterns_agree(backend, make) -> None:
    """A mask of all true is no mask; a causal pattern is its triangle; padding removes its keys."""
    query, key, value = make(tokens=(9, 9)).tensors
    options = {"backend": backend}
    everything, valid = torch.ones(9, 9, dtype=torch.bool), torch.arange(9)[None].expand(2, 9) < 6
    dense, causal = attend(query, key, value, **options), attend(query, key, value, pattern=Causal(), **options)
    torch.testing.assert_close(attend(query, key, value, pattern=Masked(everything), **options), dense)
    torch.testing.assert_close(attend(query, key, value, pattern=Masked(everything.tril()), **options), causal)
    torch.testing.assert_close(
        attend(query, key, value, pattern=Padded(valid), **options),
        attend(query, key[:, :, :6], value[:, :, :6], **options),
    )


@backends
def test_decoding_gives_the_last_rows_of_the_prefill(backend, make) -> None:
    query, key, value = make(tokens=(9, 9)).tensors
    prefill = attend(query, key, value, pattern=Causal(), backend=backend)
    for step in (1, 3):
        decoded = attend(query[:, :, -step:], key, value, pattern=Causal(), backend=backend)
        torch.testing.assert_close(decoded, prefill[:, :, -step:])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 100), backend=st.sampled_from(["torch", "reference"]))
def test_shuffled_keys_give_the_same_output(make, seed, backend) -> None:
    query, key, value = make(tokens=(5, 11), seed=seed).tensors
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    wanted = StatisticsRequest(received=True)
    before = attend(query, key, value, statistics=wanted, backend=backend)
    after = attend(query, key[:, :, order], value[:, :, order], statistics=wanted, backend=backend)
    torch.testing.assert_close(after.output, before.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.statistics.received, before.statistics.received[..., order], rtol=1e-4, atol=1e-5)


@backends
def test_inputs_of_any_layout(backend, make) -> None:
    """Heads split from one projection are not contiguous, and expanded keys share memory."""
    packed = torch.randn(2, 63, 3, 4, 48, generator=torch.Generator().manual_seed(0))
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    expected = attend(query.contiguous(), key.contiguous(), value.contiguous(), backend=backend)
    torch.testing.assert_close(attend(query, key, value, backend=backend), expected)
    one = key[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        attend(query, one, one, backend=backend), attend(query, one.clone(), one.clone(), backend=backend)
    )


@backends
def test_autocast_decides_the_dtype_but_not_that_of_statistics(backend, make) -> None:
    problem = make("causal")
    wanted = StatisticsRequest(lse=True, rows=(-1,))
    query, key, value = problem.tensors
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(query, key, value.bfloat16(), statistics=wanted, backend=backend, **problem.options)
    cast = attend(*problem.to(torch.bfloat16).tensors, statistics=wanted, backend=backend, **problem.options)
    assert isinstance(mixed, Attended)
    assert mixed.output.dtype == torch.bfloat16
    assert torch.equal(mixed.output, cast.output)
    assert torch.equal(mixed.statistics.lse, cast.statistics.lse)
    assert torch.equal(mixed.statistics.rows, cast.statistics.rows)


def test_meta_tensors_give_shapes() -> None:
    query, key, value = (torch.empty(2, 4, 9, dim, device="meta") for dim in (8, 8, 6))
    result = attend(query, key, value, statistics=StatisticsRequest(lse=True))
    assert result.output.shape == (2, 4, 9, 6)
    assert result.statistics.lse.shape == (2, 4, 9)


def test_importing_kernels_loads_torch_alone() -> None:
    """In a fresh interpreter, against what ``import torch`` loads by itself."""
    script = (
        "import sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import vislm.kernels\n"
        "new = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(sorted(new))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['vislm']"
