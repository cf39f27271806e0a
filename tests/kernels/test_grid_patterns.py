"""Grid patterns: the published window rule, its relations to other patterns, and what is refused."""

from __future__ import annotations

import pytest
import torch

from vislm.errors import UnknownName, UsageError
from vislm.kernels import (
    AxialBias,
    Blocked,
    DecoupledBias,
    HeadwiseBias,
    LowRankBias,
    Neighborhood,
    RelativeBias,
    Sigmoid,
    StatisticsRequest,
    Window,
    attend,
)


def ranges(pattern) -> list[tuple[int, int]]:
    first, last = pattern.span(0, torch.arange(pattern.query_grid[0]))
    return list(zip(first.tolist(), last.tolist(), strict=True))


def starts(pattern) -> list[int]:
    return [first for first, _ in ranges(pattern)]


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (8, 3, 1, [0, 0, 1, 2, 3, 4, 5, 5]),
        (8, 4, 1, [0, 0, 0, 1, 2, 3, 4, 4]),
        (10, 4, 3, [0, 0, 0, 2, 2, 2, 5, 5, 5, 6]),
        (10, 4, 4, [0, 0, 0, 0, 4, 4, 4, 4, 6, 6]),
        (16, 6, 4, [0] * 4 + [3] * 4 + [7] * 4 + [10] * 4),
    ],
)
def test_window_starts(length, window, stride, expected) -> None:
    assert starts(Neighborhood(length, window, stride=stride)) == expected


def test_causal_ranges() -> None:
    expected = [(0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8), (6, 9)]
    assert ranges(Neighborhood(10, 4, stride=3, causal=True)) == expected


def test_dilation_groups() -> None:
    expected = [(0, 4), (1, 5), (0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (3, 7), (4, 8)]
    assert ranges(Neighborhood(9, 3, dilation=2)) == expected
    mask = matrix(Neighborhood(9, 3, dilation=2))
    assert mask[4].nonzero().flatten().tolist() == [2, 4, 6]


def test_masked_border_drops_keys() -> None:
    assert ranges(Neighborhood(6, 4, border="mask")) == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 5)]


def matrix(pattern, prefix_queries: bool = True) -> torch.Tensor:
    num_keys = pattern.prefix + int(torch.tensor(pattern.grid).prod())
    num_queries = int(torch.tensor(pattern.query_grid).prod()) + (pattern.prefix if prefix_queries else 0)
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    return pattern.mask(position, torch.arange(num_keys)[None])


def test_relations_between_patterns() -> None:
    windows = matrix(Window((8, 12), 4))
    assert torch.equal(windows, matrix(Neighborhood((8, 12), 4, stride=4)))
    assert torch.equal(windows, matrix(Blocked((8, 12), 4)))
    assert matrix(Neighborhood((3, 5), (3, 5))).all()
    assert torch.equal(matrix(Neighborhood(7, 7, causal=True)), torch.ones(7, 7).tril().bool())
    halo, window = Blocked(24, 4, 2), Neighborhood(24, 8, stride=4)
    assert ranges(halo)[8:12] == ranges(window)[8:12] == [(6, 13)] * 4


def test_shifted_windows_are_the_rolled_ones() -> None:
    """Swin: roll by -shift, cut into windows, hide pairs of tokens that were not neighbours before the roll."""
    size, window, shift = 12, 4, 2
    rolled = [(place + shift) % size for place in range(size)]
    region = [0 if place < size - window else 1 if place < size - shift else 2 for place in range(size)]
    expected = torch.zeros(size, size, dtype=torch.bool)
    for one in range(size):
        for other in range(size):
            together = one // window == other // window and region[one] == region[other]
            expected[rolled[one], rolled[other]] = together
    assert torch.equal(matrix(Window(size, window, shift)), expected)


def test_prefix_tokens_see_and_are_seen() -> None:
    mask = matrix(Neighborhood((4, 4), 3, prefix=2))
    assert mask[:2].all()
    assert mask[:, :2].all()
    assert torch.equal(mask[2:, 2:], matrix(Neighborhood((4, 4), 3)))
    assert torch.equal(matrix(Neighborhood((4, 4), 3, prefix=2), prefix_queries=False), mask[2:])


def test_patterns_are_values() -> None:
    assert Neighborhood((4, 4), 3) == Neighborhood([4, 4], [3, 3], stride=1, dilation=(1, 1))
    assert len({Window((4, 4), 2), Window((4, 4), 2, 0), Window((4, 4), 2, 1)}) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Neighborhood((5, 9), 0), "window=0.*>= 1"),
        (lambda: Neighborhood((5, 9), (3, -1)), "window=.*>= 1"),
        (lambda: Neighborhood((5, 9), 7), "larger than axis 0 of the grid.*at most 5"),
        (lambda: Neighborhood((5, 9), 3, dilation=2), "3 x dilation 2 = 6.*at most 2"),
        (lambda: Neighborhood((5, 9), 3, stride=4), "stride 4 is larger than the window 3"),
        (lambda: Neighborhood((5, 9), (3, 3, 3)), "one per axis of the grid"),
        (lambda: Neighborhood((5, 9), 2.5), "expected an integer"),
        (lambda: Neighborhood((2, 3, 4, 5), 1), "1 to 3 positive sizes"),
        (lambda: Neighborhood((0, 4), 1), "1 to 3 positive sizes"),
        (lambda: Neighborhood((4, 4), 3, causal=1), "expected a bool"),
        (lambda: Neighborhood((4, 4), 3, prefix=-1), "prefix=-1"),
        (lambda: Blocked((9, 9), 4, border="zero"), "whole blocks.*pad"),
        (lambda: Blocked((8, 8), 4, query_stride=3), "query_stride 3 does not divide"),
        (lambda: Blocked((4, 4), 8), "block 8 is larger"),
        (lambda: Window((8, 8), 4, 4), "shift 4 of axis 0 is not smaller"),
        (lambda: Window((8, 8), 9), "window 9 is larger"),
    ],
)
def test_patterns_refuse(build, message) -> None:
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize(
    "build", [lambda: Neighborhood(4, 3, border="wrap"), lambda: Blocked(4, 2, border="wrap")], ids=["window", "block"]
)
def test_unknown_borders(build) -> None:
    with pytest.raises(UnknownName, match="wrap"):
        build()


QUERY = torch.zeros(1, 2, 45, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": Neighborhood((5, 8), 3)}, "expects 40 keys, but there are 45"),
        ({"pattern": Neighborhood((5, 9), 3, prefix=1)}, "expects 46 keys"),
        ({"bias": RelativeBias(torch.zeros(2, 5, 5))}, "needs a pattern on a grid.*Window"),
        ({"pattern": Neighborhood((5, 9), 3), "bias": RelativeBias(torch.zeros(3, 5, 5))}, "expected \\(1 or Hq = 2"),
        ({"pattern": Neighborhood((5, 9), 3), "bias": RelativeBias(torch.zeros(2, 3, 5))}, "from -2 to 2"),
        (
            {"pattern": Neighborhood((5, 9), 3), "bias": RelativeBias(torch.zeros(2, 5, 5), (2, 4))},
            "from -2 to 2; expected 5",
        ),
        (
            {"pattern": Neighborhood((5, 9), 3, causal=True), "bias": RelativeBias(torch.zeros(2, 5, 5))},
            "not defined with causal",
        ),
        (
            {"pattern": Window((5, 9), (5, 9)), "bias": DecoupledBias((torch.zeros(9, 4),))},
            "1 tables for a grid of 2 axes",
        ),
        (
            {"pattern": Window((5, 9), (5, 9)), "bias": DecoupledBias((torch.zeros(9, 3), torch.zeros(17, 4)))},
            "expected 2 tables",
        ),
        (
            {"pattern": Window((5, 9), (5, 9)), "bias": AxialBias((torch.zeros(1, 2, 4, 9),) * 2, (4, 8))},
            "expected 2 tensors",
        ),
        ({"bias": LowRankBias(torch.zeros(1, 2, 45, 3), torch.zeros(1, 2, 44, 3))}, "key_factor has shape"),
        ({"bias": LowRankBias(torch.zeros(1, 2, 45, 3), torch.zeros(1, 2, 45, 2))}, "must agree"),
        (
            {
                "bias": HeadwiseBias(
                    LowRankBias(torch.zeros(1, 1, 45, 3), torch.zeros(1, 1, 45, 3)),
                    (0,),
                    torch.zeros(1, 1, 45, 45),
                    (0,),
                )
            },
            "exactly once",
        ),
        ({"normalize": Sigmoid(bias=float("nan"))}, "finite"),
        (
            {"pattern": Blocked((5, 9), (5, 3), border="zero"), "normalize": Sigmoid(row_norm="length")},
            "row_norm='length'",
        ),
        ({"normalize": "sigmoid", "statistics": StatisticsRequest(lse=True)}, "no log-sum-exp"),
    ],
)
def test_calls_refuse(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        attend(QUERY, QUERY, QUERY, **options)


@pytest.mark.parametrize("normalize", ["softplus", Sigmoid(row_norm="count")])
def test_unknown_normalizations(normalize) -> None:
    with pytest.raises(UnknownName, match=r"softplus|count"):
        attend(QUERY, QUERY, QUERY, normalize=normalize)


def test_swin_tables_of_another_window_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(169, H\)"):
        RelativeBias.swin(torch.zeros(81, 3), 7)


def test_swin_and_nat_conventions() -> None:
    """Swin's table counts query minus key; NAT's counts key minus query."""
    table = torch.randn(25, 2)
    converted = RelativeBias.swin(table, 3).table
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            assert torch.equal(converted[:, dy + 2, dx + 2], table[(-dy + 2) * 5 + (-dx + 2)])
