"""The torch backend never allocates an N x N tensor, in inference or in training."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vislm.kernels import Causal, Dense, Padded, StatisticsRequest, attend, attention_statistics

HEADS = 2


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def tensors(num_tokens: int, requires_grad: bool = False):
    random = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, heads, num_tokens, 16, generator=random).requires_grad_(requires_grad) for heads in (HEADS, 1, 1)
    )


def everything(num_tokens: int) -> StatisticsRequest:
    return StatisticsRequest(
        lse=True,
        rows=(0, -1),
        received=True,
        mass={"image": torch.arange(num_tokens) < 576},
        entropy=True,
        maximum=True,
        output_norm=True,
    )


def patterns(num_tokens: int):
    valid = torch.arange(num_tokens)[None] > 5
    return [Dense(), Causal(), Padded(valid), Padded(valid, causal=True)]


@pytest.mark.parametrize("index", range(4), ids=["dense", "causal", "padded", "padded_causal"])
def test_output_and_statistics(index) -> None:
    num_tokens = 1536
    with Largest() as largest:
        attend(
            *tensors(num_tokens),
            pattern=patterns(num_tokens)[index],
            key_logits=torch.zeros(num_tokens),
            statistics=everything(num_tokens),
            backend="torch",
        )
    assert largest.numel < num_tokens**2 / 2


def test_values_of_another_width_have_no_fused_kernel() -> None:
    num_tokens = 2048
    query, key, value = tensors(num_tokens)
    with Largest() as largest:
        attend(query, key, value[..., :8], pattern=Causal(), backend="torch")
    assert largest.numel < HEADS * num_tokens**2 / 2


def test_the_reference_would_be_caught() -> None:
    with Largest() as largest:
        attend(*tensors(256), backend="reference")
    assert largest.numel >= 256**2


def test_memory_grows_linearly() -> None:
    """Twice the tokens, at most twice the largest tensor."""
    sizes = []
    for num_tokens in (512, 1024, 2048):
        with Largest() as largest:
            attention_statistics(*tensors(num_tokens), request=everything(num_tokens), backend="torch")
        sizes.append(largest.numel)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[2] <= 2 * sizes[1]


def test_chosen_rows_compute_only_their_rows() -> None:
    num_tokens = 1024
    with Largest() as largest:
        wanted = StatisticsRequest(rows=(0, -1), received=torch.tensor([5]))
        attention_statistics(*tensors(num_tokens), request=wanted, backend="torch")
    assert largest.numel <= HEADS * 16 * num_tokens  # the inputs; three rows of logits are less


def test_training_keeps_no_matrix_for_the_backward_pass() -> None:
    num_tokens = 1024
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    inputs = tensors(num_tokens, requires_grad=True)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = attend(*inputs, statistics=everything(num_tokens), backend="torch")
    assert saved < num_tokens**2
    statistics = result.statistics
    (
        result.output.sum() + statistics.lse.sum() + statistics.entropy.sum() + statistics.received[..., 0].sum()
    ).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)
