"""Index arithmetic, as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vislm.errors import UsageError
from vislm.lmm.choosing.tokens import compact, number_images, token_count, top_per_image

masks = arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 12))).filter(lambda m: m.any())


@given(masks, st.sampled_from(["left", "right"]))
def test_compact_keeps_exactly_the_chosen_columns_in_order(mask, pad) -> None:
    keep = torch.from_numpy(mask)
    index, valid = compact(keep, pad)
    for row in range(len(keep)):
        chosen = index[row] if valid is None else index[row][valid[row]]
        assert chosen.tolist() == keep[row].nonzero().flatten().tolist()
        if valid is not None and not valid[row].all():
            assert valid[row].tolist() == sorted(valid[row].tolist(), reverse=pad == "right")


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 99))
def test_top_per_image_ranks_within_images(tokens, keep, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 2 * tokens + 3, generator=generator)
    image_of = torch.tensor([[-1, *[0] * tokens, -1, *[1] * tokens, -1], [-1, -1, *[2] * tokens, *[-1] * (tokens + 1)]])
    kept = top_per_image(scores, image_of, keep)
    assert kept[image_of < 0].all()
    for image in range(3):
        inside = image_of == image
        best = scores[inside].topk(min(keep, tokens)).values.min()
        assert int(kept[inside].sum()) == min(keep, tokens)
        assert (scores[inside & kept] >= best).all()


def test_ties_go_to_the_lower_column() -> None:
    kept = top_per_image(torch.ones(1, 6), torch.tensor([[-1, 0, 0, 0, 0, -1]]), 2)
    assert kept.tolist() == [[True, True, True, False, False, True]]


def test_token_count_takes_numbers_and_ratios() -> None:
    assert [token_count(k, 576) for k in (64, 0.25, 1.0, 1, 600, 1e-6)] == [64, 144, 576, 1, 576, 1]


def test_adjacent_images_are_told_apart_by_their_lengths() -> None:
    is_image = torch.tensor([[False, True, True, True, False, True], [False, True, True, False, False, False]])
    expected = [[-1, 0, 0, 1, -1, 2], [-1, 3, 3, -1, -1, -1]]
    assert number_images(is_image, [2, 1, 1, 2]).tolist() == expected
    assert number_images(is_image, None).tolist() == [[-1, 0, 0, 0, -1, 1], [-1, 2, 2, -1, -1, -1]]
    with pytest.raises(UsageError, match=r"5 visual tokens .* 6 image placeholders"):
        number_images(is_image, [5])
