"""Two ways to the same choice: quick ones against plain ones."""

from __future__ import annotations

import pytest
import torch

from vislm.lmm.decoder.attention import AttentionCall
from vislm.token_pruning import divprune
from vislm.token_pruning.flowcut import cls_flow, mean_query_flow


@pytest.mark.parametrize("count", [1, 7, 40, 60])
def test_divprune_without_the_whole_matrix(monkeypatch, count) -> None:
    tokens = torch.randn(60, 16, generator=torch.Generator().manual_seed(count))
    quick = divprune.max_min_diversity(tokens, count)
    monkeypatch.setattr(divprune, "WHOLE", 0)
    monkeypatch.setattr(divprune, "ROWS", 13)
    assert quick.tolist() == divprune.max_min_diversity(tokens, count).tolist()
    assert len(set(quick.tolist())) == count


@pytest.mark.parametrize("flow", [cls_flow, mean_query_flow])
def test_padding_has_no_part_in_flowcuts_signals(flow) -> None:
    """Crops that keep different numbers of patches are padded for a while."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(3))
    alone = flow(AttentionCall(query, key, value, None, False, 0.5))
    padded = [torch.cat([part, torch.randn(1, 2, 3, 4, generator=generator)], 2) for part in (query, key, value)]
    mask = (torch.arange(12) < 9)[None, None, None]
    beside = flow(AttentionCall(*padded, mask, False, 0.5))
    patches = alone.attention.shape[1]
    torch.testing.assert_close(beside.attention[:, :patches], alone.attention)
    assert not beside.attention[:, patches:].any()
    if alone.similarity is not None:
        torch.testing.assert_close(beside.similarity[:, :patches], alone.similarity)


def test_flowcuts_rows_are_those_of_the_attention() -> None:
    query, key, value = (torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    call = AttentionCall(query, key, value, None, False, 0.5)
    rows = call.rows(torch.tensor([0]))[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(cls_flow(call).attention, rows)
    mean = AttentionCall(query.mean(2, keepdim=True), key, value, None, False, 0.5).rows(torch.tensor([0]))
    torch.testing.assert_close(mean_query_flow(call).attention, mean[:, :, 0].mean(1))
