"""The dense bias that factors stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vislm.kernels.bias import LowRankBias


@pytest.fixture(scope="session")
def dense() -> Callable[..., Tensor]:
    """Return ``query_factor @ key_factor^T`` ``(1|B, 1|H, Nq, Nk)``, summed in ``dtype``."""

    def product(bias: LowRankBias, dtype: torch.dtype = torch.float64) -> Tensor:
        assert bias.query_factor.dtype == bias.key_factor.dtype
        return bias.query_factor.to(dtype) @ bias.key_factor.to(dtype).transpose(-1, -2)

    return product


@pytest.fixture(scope="session")
def offsets() -> Callable[[int, int], Tensor]:
    """Return ``key position - query position`` ``(Nq, Nk)``, queries aligned to the end of the keys."""

    def table(num_queries: int, num_keys: int) -> Tensor:
        query = torch.arange(num_keys - num_queries, num_keys)
        return (torch.arange(num_keys)[None] - query[:, None]).double()

    return table
