"""Random pruning: uniform, reproducible, the same in any batch."""

from __future__ import annotations

import torch

from vislm.lmm.interventions import ImageView
from vislm.token_pruning.random import RandomPruning


def kept(features: torch.Tensor, seed: int = 0) -> torch.Tensor:
    view = ImageView(features, torch.ones(len(features), dtype=torch.bool), 0, 0, {})
    return RandomPruning(keep=8, seed=seed)._select(view)


def test_every_token_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(kept(torch.randn(32, 24, generator=generator)).float() for _ in range(2000))
    assert int(total.sum()) == 16_000
    assert (total / 2000 - 0.25).abs().max() < 0.05  # 5 standard errors of .0097


def test_the_draw_depends_on_image_and_seed_alone() -> None:
    features = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kept(features), kept(features + 1e-6))
    assert not torch.equal(kept(features), kept(features, seed=1))
    assert not torch.equal(kept(features), kept(-features))
