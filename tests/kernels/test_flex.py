"""FlexAttention: block masks, tracing, and what it refuses. Its numbers are checked by the conformance suite."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from vislm.kernels import (
    Blocked,
    Causal,
    DecoupledBias,
    Dense,
    Masked,
    Neighborhood,
    Padded,
    RelativeBias,
    StatisticsRequest,
    Window,
    attend,
)
from vislm.kernels.backends import flex, reference
from vislm.kernels.backends.flex.call import attention
from vislm.kernels.backends.flex.masks import block_mask
from vislm.kernels.checks import checked_request
from vislm.kernels.lowering import lowered
from vislm.kernels.request import AttentionRequest

LSE = StatisticsRequest(lse=True, output_norm=True)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def request_of(query, key, value, **options) -> AttentionRequest:
    defaults = {"pattern": Dense(), "bias": None, "scale": None, "normalize": "softmax", "statistics": None}
    checked = checked_request(query, key, value, **(defaults | {"key_logits": None} | options))
    return lowered(checked)[0]


def tensors(num_queries: int, num_keys: int, head_dim: int = 16, *, device: str = "cpu", dtype=torch.float32):
    random = torch.Generator(device).manual_seed(num_queries + num_keys + head_dim)
    sizes = (2, 4, num_queries, head_dim), (2, 2, num_keys, head_dim), (2, 2, num_keys, head_dim + 8)
    return tuple(torch.randn(size, generator=random, device=device).to(dtype) for size in sizes)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def random_mask(*shape: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize(
    ("pattern", "num_queries", "num_keys"),
    [
        (Causal(), 300, 300),
        (Causal(), 130, 300),
        (Neighborhood((20, 20), (3, 5), prefix=3), 403, 403),
        (Neighborhood((20, 20), (3, 5), dilation=3, prefix=3), 400, 403),
        (Neighborhood(513, 129), 513, 513),
        (Blocked((8, 32), 8, 2, query_stride=4), 16, 256),
        (Window((16, 16), 8, 3), 256, 256),
        (Padded(random_mask(2, 300, share=0.01)), 200, 300),
        (Padded(torch.arange(300).expand(2, -1) < 256, causal=True), 300, 300),
        (Masked(random_mask(2, 1, 200, 300, share=1e-4)), 200, 300),
        (Masked(torch.ones(200, 300, dtype=torch.bool)), 200, 300),
    ],
    ids=str,
)
def test_blocks_are_those_that_pytorch_finds(pattern, num_queries, num_keys) -> None:
    request = request_of(*tensors(num_queries, num_keys), pattern=pattern)
    ours = block_mask(request)
    theirs = create_block_mask(ours.mask_mod, 2, 4, num_queries, num_keys, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name).expand(2, 4, -1), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense().expand(2, 4, -1, -1), theirs.to_dense())


def test_blocks_are_found_once_per_pattern() -> None:
    def blocks(pattern):
        return block_mask(request_of(*tensors(45, 45), pattern=pattern))

    assert blocks(Neighborhood((5, 9), 3)) is blocks(Neighborhood((5, 9), [3, 3]))
    assert blocks(Neighborhood((5, 9), 3)) is not blocks(Neighborhood((5, 9), 3, stride=2))
    padded = Padded(random_mask(2, 45))
    assert blocks(padded) is not blocks(padded)  # the tensor may have changed
    assert blocks(Dense()) is None


def test_blocks_found_without_gradients_serve_training() -> None:
    with torch.inference_mode():
        found = block_mask(request_of(*tensors(63, 63), pattern=Window((7, 9), (7, 3), 0)))
    assert not found.kv_indices.is_inference()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((17, 63), {"key_logits": torch.linspace(-1, 1, 63)}),
        ((63, 17), {"pattern": Causal()}),
        ((47, 47), {"pattern": Neighborhood((5, 9), (3, 4), prefix=2), "bias": RelativeBias(normal(4, 5, 7))}),
        (
            (12, 24),
            {
                "pattern": Blocked((4, 6), 2, 1, query_stride=(2, 1), border="zero"),
                "bias": DecoupledBias((normal(7, 16), normal(4, 7, 16))),
            },
        ),
    ],
    ids=["dense", "causal", "neighborhood", "halo"],
)
def test_traced_call(shape, options) -> None:
    """The conformance suite runs the untraced definition; this is what a user gets."""
    request = request_of(*tensors(*shape), **options, statistics=LSE)
    output, statistics = attention(request)
    expected = reference.run(request)
    torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.lse, expected.statistics.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.output_norm, expected.statistics.output_norm, rtol=1e-5, atol=1e-5)


def test_new_tensors_do_not_trace_again() -> None:
    pattern = Neighborhood((5, 9), (3, 4))

    def call(seed: int) -> None:
        table = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(seed))
        query, key, value = (tensor + seed for tensor in tensors(45, 45))
        attention(request_of(query, key, value, pattern=pattern, bias=RelativeBias(table)))

    call(0)
    traced = counters["stats"]["unique_graphs"]
    call(1)
    assert counters["stats"]["unique_graphs"] == traced


def test_more_versions_than_pytorch_allows_a_function() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for head_dim in (4, 12, 20):
            request = request_of(*tensors(9, 9, head_dim))
            expected = attend(request.query, request.key, request.value, backend="reference")
            torch.testing.assert_close(attention(request).output, expected)
        assert torch._dynamo.config.recompile_limit == 1


def test_tensors_that_could_have_gradients() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors(45, 45))
    table = normal(4, 5, 7).requires_grad_()
    options = {"pattern": Neighborhood((5, 9), (3, 4)), "bias": RelativeBias(table)}
    request = request_of(query, key, value, **options)
    assert flex.supports(request) == "FlexAttention has no backward on the CPU"
    with torch.no_grad():
        assert flex.supports(request) is None
        expected = attend(query, key, value, backend="reference", **options)
        torch.testing.assert_close(attention(request).output, expected, rtol=1e-5, atol=1e-5)
    frozen = request_of(query.detach(), key.detach(), value.detach(), **options)
    assert flex.supports(frozen) == "FlexAttention has no backward on the CPU"  # the table wants a gradient


class Band:
    """A pattern of someone's own; its mask may be anything that broadcasts."""

    def mask(self, query_index, key_index):
        return (query_index - key_index).abs() <= 2

    def fit(self, shape):
        return self


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"statistics": LSE}, None),
        ({"pattern": Band()}, "has no mask function for the pattern Band"),
        ({"normalize": "sigmoid"}, "has softmax only"),
        ({"statistics": StatisticsRequest(rows=(0,))}, "measures lse and output_norm only, not rows"),
        (
            {
                "statistics": StatisticsRequest(
                    received=torch.tensor([0]), entropy=True, mass={}, maximum=True, lse=True
                )
            },
            "measures lse and output_norm only, not received, mass, entropy, maximum",
        ),
        ({"value": None}, "measures nothing without computing the output"),
        ({"query": torch.zeros(2, 4, 0, 16)}, "has no kernel for empty tensors"),
    ],
)
def test_reasons(options, reason) -> None:
    query, key, value = tensors(9, 9)
    inputs = {"query": query, "key": key, "value": value}
    mine = {name: options.get(name, tensor) for name, tensor in inputs.items()}
    rest = {name: option for name, option in options.items() if name not in inputs}
    assert flex.supports(request_of(mine["query"], mine["key"], mine["value"], **rest)) == reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.bfloat16, 16, None),
        (torch.float32, 48, None),
        (torch.float64, 16, "computes in float32 on a GPU, these tensors are float64"),
        (torch.float32, 8, "needs a head_dim of 16 or more, this is 8"),
    ],
)
def test_reasons_on_a_gpu(dtype, head_dim, reason, on_pretended_gpu, monkeypatch) -> None:
    monkeypatch.setattr("vislm.kernels.backends.flex.find_spec", lambda name: name)
    request = on_pretended_gpu(lambda device: request_of(*tensors_on(device, dtype, head_dim)))
    assert flex.supports(request) == reason
    monkeypatch.setattr("vislm.kernels.backends.flex.find_spec", lambda name: None)
    assert flex.supports(request) == "needs Triton, which is not installed"


def tensors_on(device, dtype, head_dim):
    return (torch.empty(2, 4, 9, head_dim, dtype=dtype, device=device, requires_grad=True) for _ in range(3))


def test_waits_to_be_asked_for(on_pretended_gpu) -> None:
    def hesitation(**options):
        return flex.only_when_forced(
            on_pretended_gpu(lambda device: request_of(*tensors_on(device, torch.float32, 16), **options))
        )

    assert flex.only_when_forced(request_of(*tensors(9, 9))) == "forms the whole matrix on a CPU"
    assert hesitation() == "compiles what PyTorch's fused attention has ready-made"
    assert hesitation(pattern=Causal()) is not None
    assert hesitation(statistics=LSE) is None
    assert hesitation(pattern=Window((3, 3), 2)) is None


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_on_a_gpu(dtype) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    leaves = [tensor.requires_grad_() for tensor in tensors(47, 47, 32, device="cuda", dtype=dtype)]
    leaves.append(torch.randn(4, 5, 7, generator=random, device="cuda", requires_grad=True))
    cotangent = torch.randn(2, 4, 47, 40, generator=random, device="cuda")

    def by(backend: str, kind: torch.dtype):
        query, key, value, table = (leaf.to(kind) for leaf in leaves)
        options = {"pattern": Neighborhood((5, 9), (3, 4), prefix=2), "bias": RelativeBias(table)}
        output, statistics = attend(query, key, value, backend=backend, statistics=LSE, **options)
        total = (output * cotangent).sum() + statistics.lse.square().sum()
        return [output, statistics.lse, *torch.autograd.grad(total, leaves)]

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for found, expected in zip(by("flex", dtype), by("reference", torch.float64), strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.double().norm()
