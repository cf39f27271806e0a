"""Budgets of crops, and seats for new tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import UsageError
from vislm.lmm.choosing.crops import Group, check_budget, crop_budgets, crop_tokens, patch_attention, seated
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import ImageView, TowerRecord


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(1, 250))
def test_budgets_are_equal_shares_of_exactly_the_total(sizes: list[int], keep: int) -> None:
    budgets = crop_budgets(sizes, keep, None)
    assert sum(budgets) == min(keep, sum(sizes))
    assert all(0 <= b <= n for b, n in zip(budgets, sizes, strict=True))
    cut = [b for b, n in zip(budgets, sizes, strict=True) if b < n]  # a crop may get less only for want of tokens
    assert not cut or max(budgets) - min(cut) <= 1


def test_the_remainder_goes_to_the_first_crops_and_ratios_count_the_image() -> None:
    assert crop_budgets([576] * 5, 640, None) == [128] * 5
    assert crop_budgets([9, 9, 9], 11, None) == [4, 4, 3]
    assert crop_budgets([9, 9, 9], 2, None) == [1, 1, 0]
    assert crop_budgets([9, 3], 0.5, None) == [3, 3]
    assert crop_budgets([9, 3], 2, 4) == [4, 3]


@pytest.mark.parametrize("crop_keep", [0, -1, 0.5, True])
def test_impossible_crop_budgets(crop_keep) -> None:
    with pytest.raises(UsageError, match="crop_keep"):
        check_budget(64, crop_keep)


def test_attention_of_patches_from_cls_and_without_cls() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(3))
    call = AttentionCall(query, key, value, None, False, 0.5)
    matrix = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(patch_attention(call, 1)[..., 0], matrix[:, 0, 1:])
    torch.testing.assert_close(patch_attention(call, 3)[..., 0], matrix[:, 0, 3:])
    torch.testing.assert_close(patch_attention(call, 0)[..., 0], matrix.mean(1))


def view(tokens: int) -> ImageView:
    seen = ImageView(torch.arange(2.0 * tokens).view(tokens, 2), torch.ones(tokens, dtype=torch.bool), 0, 0, {})
    seen.tower, seen.project = TowerRecord({}, torch.zeros(1, tokens, 2), None), lambda x: 10 * x
    return seen


def test_tokens_take_the_seats_in_the_order_of_their_keys() -> None:
    own = Group(torch.tensor([4, 1]), torch.tensor([1, 2]))
    new = Group(
        torch.tensor([2]), torch.tensor([0]), torch.tensor([[5.0, 6.0]]), torch.tensor([0, 2, 3]), torch.zeros(3).long()
    )
    nobody = torch.zeros(0, dtype=torch.int64)
    extra = Group(torch.tensor([5]), torch.tensor([9]), torch.tensor([[7.0, 8.0]]), nobody, nobody)
    chosen = seated(view(6), [own, new, extra])
    assert chosen.keep.tolist() == [False, True, True, False, True, True]
    assert chosen.features is not None
    assert chosen.features.tolist() == [[50.0, 60.0], [8.0, 9.0], [2.0, 3.0], [70.0, 80.0]]
    assert chosen.size is not None
    assert chosen.size.tolist() == [3.0, 1.0, 1.0, 1.0]
    assert chosen.source is not None
    assert chosen.source.tolist() == [0, 2, 0, 0, 1, -1]


def test_tokens_of_crops_leave_out_newlines_and_go_to_the_larger_share() -> None:
    seen = view(5)
    seen.candidates[4] = False
    seen.tower = TowerRecord({"a": torch.zeros(2, 4, 1)}, None, None)

    def pack(maps: torch.Tensor, newline: float) -> torch.Tensor:
        a, b = maps[0, 0], maps[1, 0]
        return torch.stack([a, 0.7 * a + 0.3 * b, 0.4 * a + 0.6 * b, b, torch.full_like(a, newline)])

    seen.pack = pack
    assert [tokens.tolist() for tokens in crop_tokens(seen, "a")] == [[0, 1], [2, 3]]
