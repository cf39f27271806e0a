"""xFormers: how a call is put to it, and what it refuses. Its kernels need a GPU, so a stand-in takes their place."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Layout
from attention_textbook import textbook
from torch import Tensor

from vislm.kernels import Causal, Dense, Neighborhood, Padded, RelativeBias, StatisticsRequest
from vislm.kernels.backends import reference, xformers
from vislm.kernels.checks import checked_request

LSE = StatisticsRequest(lse=True, output_norm=True)


class LowerTriangularMask:
    """Square causal mask."""


class LowerTriangularFromBottomRightMask:
    """Causal mask aligned to the last key."""


class Operator:
    """One direction of a kernel, which objects as told."""

    def __init__(self, name: str, *reasons: str) -> None:
        self.NAME, self.reasons, self.asked = name, reasons, []

    def not_supported_reasons(self, inputs) -> list[str]:
        self.asked.append(inputs)
        return list(self.reasons)


class StandIn:
    """``xformers.ops.fmha`` for CPU tensors; keeps what it was asked for."""

    attn_bias = SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask, LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask
    )
    Inputs = SimpleNamespace

    def __init__(self, flash: tuple = (), cutlass: tuple = ()) -> None:
        self.MemoryEfficientAttentionFlashAttentionOp = (Operator("flashF", *flash), Operator("flashB", *flash))
        self.MemoryEfficientAttentionCutlassOp = (Operator("cutlassF", *cutlass), Operator("cutlassB", "no backward"))
        self.masks: list = []
        self.operators: list = []

    def memory_efficient_attention(self, query, key, value, mask, *, scale, op) -> Tensor:
        self.operators.append(op)
        return self._attention(query, key, value, mask, scale)[0]

    def memory_efficient_attention_forward_requires_grad(self, query, key, value, mask, *, scale, op):
        self.operators.append(op)
        output, lse = self._attention(query, key, value, mask, scale)
        return output, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)  # as cutlass does

    def _attention(self, query, key, value, mask, scale):
        self.masks.append(mask)
        (batch, num_queries, heads, _), num_keys = query.shape, key.shape[1]
        assert key.shape[:3] == value.shape[:3] == (batch, num_keys, heads)
        allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool)
        if mask is not None and not isinstance(mask, Tensor):
            shift = 0 if isinstance(mask, LowerTriangularMask) else num_keys - num_queries
            allowed = allowed.tril(shift)
        additive = mask if isinstance(mask, Tensor) else None
        if additive is not None:
            assert additive.shape == (batch, heads, num_queries, num_keys)
            assert additive.dtype == query.dtype
            assert all(stride % 8 == 0 for stride in additive.stride()[:-1])
            assert additive.stride(-1) == 1
            if bool((additive == -torch.inf).all(-1).any()):
                raise AssertionError("some kernels give NaN for a row that sees nothing")
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        result = textbook(*heads_first, Layout(allowed), additive, scale=scale)
        return result.output.transpose(1, 2), result.lse


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    fmha = StandIn()
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    monkeypatch.setattr(xformers, "_installed", lambda: True)
    return fmha


def request_of(query, key, value, **options):
    defaults = {"pattern": Dense(), "bias": None, "scale": None, "normalize": "softmax", "statistics": None}
    return checked_request(query, key, value, **(defaults | {"key_logits": None} | options))


def tensors(num_queries: int = 9, num_keys: int = 13, *, dtype=torch.float32, device="cpu", requires_grad=False):
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype).requires_grad_(requires_grad)

    torch.manual_seed(0)
    return normal(2, 4, num_queries, 16), normal(2, 2, num_keys, 16), normal(2, 2, num_keys, 8)


def additive(**shapes) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def hidden_rows() -> Tensor:
    bias = torch.zeros(4, 9, 13)
    bias[1, 3] = -torch.inf
    bias[:, :, ::4] = -torch.inf
    return bias


@pytest.mark.parametrize(
    ("shape", "options", "mask"),
    [
        ((9, 13), {}, type(None)),
        ((9, 13), {"scale": 0.0}, type(None)),
        ((13, 13), {"pattern": Causal()}, LowerTriangularMask),
        ((9, 13), {"pattern": Causal()}, LowerTriangularFromBottomRightMask),
        ((9, 13), additive(bias=(4, 9, 13), key_logits=(2, 13)), Tensor),
        ((9, 13), additive(key_logits=(13,)), Tensor),
        ((9, 13), additive(bias=()), Tensor),
        ((9, 13), {"bias": hidden_rows()}, Tensor),
        ((9, 13), {"pattern": Causal()} | additive(bias=(2, 1, 9, 13)), Tensor),
    ],
    ids=["dense", "scale", "square", "causal", "bias", "keys", "constant", "hidden", "causal_bias"],
)
@pytest.mark.parametrize("statistics", [None, LSE], ids=["output", "lse"])
def test_call(shape, options, mask, statistics, stand_in) -> None:
    request = request_of(*tensors(*shape), **options, statistics=statistics)
    output, found = xformers.run(request)
    expected, exact = reference.run(request)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(stand_in.masks[0], mask)
    if statistics is not None:
        torch.testing.assert_close(found.lse, exact.lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.output_norm, exact.output_norm, rtol=1e-5, atol=1e-5)


def test_an_additive_mask_shared_by_queries_has_no_copies(stand_in) -> None:
    xformers.run(request_of(*tensors(), **additive(key_logits=(13,))))
    assert stand_in.masks[0].stride() == (0, 0, 0, 1)


def test_operators_are_asked_about_the_call_that_is_made(stand_in) -> None:
    """What they are told has the sizes and strides of what they get, without the copies."""
    request = request_of(*tensors(), **additive(bias=(4, 9, 13)))
    xformers.run(request)
    asked = stand_in.MemoryEfficientAttentionFlashAttentionOp[0].asked[0]
    assert asked.query.data_ptr() == request.query.data_ptr()
    assert asked.key.is_meta
    assert asked.key.shape == (2, 13, 4, 16)
    assert asked.attn_bias.is_meta
    assert asked.attn_bias.shape == stand_in.masks[0].shape
    assert asked.attn_bias.stride()[2:] == stand_in.masks[0].stride()[2:]
    assert stand_in.operators == [stand_in.MemoryEfficientAttentionFlashAttentionOp]


def test_a_backward_is_asked_for_where_there_is_one(stand_in) -> None:
    stand_in.MemoryEfficientAttentionFlashAttentionOp[0].reasons = ("too old",)
    plain, training = request_of(*tensors()), request_of(*tensors(requires_grad=True))
    assert xformers._operators(plain) is stand_in.MemoryEfficientAttentionCutlassOp
    assert xformers._operators(training) is None
    assert xformers._refusals(training) == ("xFormers has no operator for it (flashF: too old; cutlassF: no backward)")
    with torch.no_grad():
        assert xformers._operators(training) is stand_in.MemoryEfficientAttentionCutlassOp


def test_gradients(stand_in) -> None:
    inputs = tensors(requires_grad=True)
    bias = additive(bias=(4, 9, 13))["bias"].requires_grad_()
    request = request_of(*inputs, bias=bias)
    weight = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((backend.run(request).output * weight).sum(), (*inputs, bias))
        for backend in (xformers, reference)
    )
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs CUDA tensors, these are on cpu"),
        ({"pattern": Padded(torch.ones(2, 13, dtype=torch.bool))}, "has no mask for the pattern Padded"),
        ({"normalize": "sigmoid"}, "has softmax only"),
        ({"statistics": StatisticsRequest(maximum=True)}, "measures lse and output_norm only, not maximum"),
        (
            {"bias": torch.zeros(13, dtype=torch.float64)},
            "adds logits in the query's dtype torch.float32, bias is torch.float64",
        ),
        (
            {"key_logits": torch.zeros(13, dtype=torch.bfloat16)},
            "adds logits in the query's dtype torch.float32, key_logits is torch.bfloat16",
        ),
        ({"bias": torch.zeros(13, requires_grad=True)}, "has no gradient of the additive logits alone"),
        (
            {"bias": torch.zeros(13, requires_grad=True), "statistics": LSE},
            "has no gradient of lse; use torch.no_grad() if none is needed",
        ),
    ],
)
def test_reasons(options, reason) -> None:
    assert xformers.supports(request_of(*tensors(), **options)) == reason


def test_reasons_of_shape() -> None:
    causal = request_of(*tensors(13, 9), pattern=Causal())
    assert xformers.supports(causal) == "has no causal mask for more queries than keys"
    table = RelativeBias(torch.zeros(4, 17))
    grid = request_of(*tensors(9, 9), pattern=Neighborhood(9, 3), bias=table)
    assert xformers.supports(grid) == "has no mask for the pattern Neighborhood"


def test_reasons_on_a_gpu(stand_in, on_pretended_gpu, monkeypatch) -> None:
    request = on_pretended_gpu(lambda device: request_of(*tensors(device=device)))
    assert xformers.supports(request) is None
    for pair in (stand_in.MemoryEfficientAttentionFlashAttentionOp, stand_in.MemoryEfficientAttentionCutlassOp):
        pair[0].reasons = ("too old", "too old")
    assert xformers.supports(request) == "xFormers has no operator for it (flashF: too old; cutlassF: too old)"
    monkeypatch.setattr(xformers, "_installed", lambda: False)
    assert xformers.supports(request) == "xFormers is not installed"


def test_is_not_imported_for_cpu_tensors() -> None:
    code = (
        "import sys, torch, vislm.kernels as kernels; query = torch.zeros(1, 1, 2, 8);"
        "kernels.attend(query, query, query); print(kernels.explain(query, query, query));"
        "sys.exit('xformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_installed_package_has_no_other_objection_than_the_device() -> None:
    """To calls of half-precision tensors: those that its operators are for."""
    pytest.importorskip("xformers", reason="xFormers is not installed")
    half = {"dtype": torch.float16}
    bias = torch.zeros(4, 9, 13, dtype=torch.float16)
    aligned = [tensor[..., :8].contiguous() for tensor in tensors(**half)]
    for options in ({}, {"pattern": Causal()}, {"bias": bias}, {"statistics": LSE}):
        judged = xformers._judged(request_of(*aligned, **options))
        reasons = [reason for reason in judged[1][1] if not reason.startswith("device=cpu")]
        assert reasons == []
