"""One test per wrong argument of the operator; those of patterns, statistics and merging are with their own tests."""

from __future__ import annotations

import pytest
import torch

from vislm.errors import UnknownName, UsageError
from vislm.kernels import attend

B, HQ, HKV, N, D = 2, 4, 2, 5, 8


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def call(**changed):
    arguments = {"query": zeros(B, HQ, N, D), "key": zeros(B, HKV, N, D), "value": zeros(B, HKV, N, D)} | changed
    return attend(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": zeros(B, N, HQ * D)}, r"query has shape \(2, 5, 32\), expected 4 axes \(B, H, N, D\)"),
        ({"key": [[0.0]]}, "key is a list, expected a tensor"),
        ({"value": zeros(B, HKV, N, D).long()}, "value is torch.int64, expected one of torch.float16"),
        ({"key": zeros(B, HKV, N, D).half()}, "mixed dtypes: query torch.float32, key torch.float16"),
        ({"value": zeros(B, HKV, N, D, device="meta")}, "mixed devices: query cpu, key cpu, value meta"),
        ({"key": zeros(3, HKV, N, D)}, "key has batch size 3, the query 2"),
        ({"value": zeros(1, HKV, N, D)}, "value has batch size 1, the query 2"),
        ({"key": zeros(B, HKV, N, 4)}, "the query has head_dim 8, the key 4"),
        ({"value": zeros(B, HKV, 4, D)}, r"value has \(heads, tokens\) = \(2, 4\), the key \(2, 5\)"),
        ({"value": zeros(B, HQ, N, D)}, r"value has \(heads, tokens\) = \(4, 5\)"),
        ({"query": zeros(B, 5, N, D)}, "expected the query heads to be a multiple of the key heads"),
        ({"query": zeros(B, HQ, N, 0), "key": zeros(B, HKV, N, 0)}, "no empty axis"),
        ({"scale": float("nan")}, "scale=nan, expected a finite number"),
        ({"scale": "auto"}, "scale='auto'"),
        ({"scale": True}, "scale=True"),
        ({"bias": zeros(3, N, N)}, r"bias has shape \(3, 5, 5\), which does not broadcast to .* \(2, 4, 5, 5\)"),
        ({"bias": zeros(1, B, HQ, N, N)}, "bias has shape .* does not broadcast"),
        ({"bias": zeros(N, N).bool()}, r"bias is torch.bool.*pattern=Masked\(mask\)"),
        ({"bias": 1.0}, "bias is a float, expected a floating-point tensor"),
        ({"bias": zeros(N, N, device="meta")}, "bias is on meta, the query on cpu"),
        ({"key_logits": zeros(4)}, r"key_logits has shape \(4,\), expected \(Nk,\), \(B, Nk\) or \(B, Hq, Nk\)"),
        ({"key_logits": zeros(N).long()}, "key_logits is torch.int64"),
        ({"key_logits": zeros(N, device="meta")}, "key_logits is on meta"),
        ({"head_scale": zeros(HKV)}, r"head_scale has shape \(2,\), expected \(Hq,\) = \(4,\) or \(B, Hq\) = \(2, 4\)"),
        ({"head_scale": [1.0]}, "head_scale is a list"),
        ({"head_scale": zeros(HQ, device="meta")}, "head_scale is on meta"),
    ],
)
def test_wrong_argument(changed, message) -> None:
    with pytest.raises(UsageError, match=message):
        call(**changed)


def test_unknown_normalization() -> None:
    with pytest.raises(UnknownName, match=r"unknown normalization 'softmx'; did you mean 'softmax'"):
        call(normalize="softmx")


def test_usage_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        call(key=zeros(B, HKV, N, 4))
