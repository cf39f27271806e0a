"""Makes the tiny models of the session's tests importable, and shares a model and a scene."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def causal():
    """Random causal attention (B, H, T, T)."""

    def make(batch: int = 2, heads: int = 3, tokens: int = 9, seed: int = 0) -> torch.Tensor:
        logits = 2.0 * torch.randn(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
        return logits.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1)

    return make
