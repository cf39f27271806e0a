"""Bipartite soft matching: the definition as loops, protected tokens, ToMe's own numbers, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels import matching as module
from vislm.kernels.matching import bipartite_soft_matching

GOLDEN = Path(__file__).parent / "golden" / "tome"
PROTECTED = st.sampled_from(
    [
        {},
        {"class_token": True},
        {"class_token": True, "distill_token": True},
        {"distill_token": True},
        {"registers": 3},
        {"class_token": True, "distill_token": True, "registers": 2},
    ]
)


def protected_places(class_token: bool = False, distill_token: bool = False, registers: int = 0) -> set[int]:
    first = 2 if distill_token else int(class_token)
    return {place for place, given in ((0, class_token), (1, distill_token)) if given} | {
        *range(first, first + registers)
    }


def groups_by_hand(metric: Tensor, r: int, protected: set[int]) -> set[tuple[int, ...]]:
    """Return the groups of places that become one token, of one sample."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    first = [place for place in range(0, len(metric), 2) if place not in protected]
    second = [place for place in range(1, len(metric), 2) if place not in protected]
    free = len(metric) - len([place for place in protected if place < len(metric)])
    best = {a: max((float(unit[a] @ unit[b]), -b) for b in second) for a in first} if second else {}
    merged = sorted(best, key=lambda a: -best[a][0])[: min(r, free // 2)]
    groups: dict[int, list[int]] = {place: [place] for place in range(len(metric)) if place not in merged}
    for a in merged:
        groups[-best[a][1]].append(a)
    return {tuple(sorted(group)) for group in groups.values()}


@given(st.integers(1, 13), st.integers(0, 9), PROTECTED, st.integers(0, 999))
def test_the_most_similar_pairs_of_both_halves_merge(tokens: int, r: int, options: dict, seed: int) -> None:
    metric = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = bipartite_soft_matching(metric, r, **options)
    for sample in range(2):
        index = found.index[sample].tolist()
        groups = {tuple(n for n in range(tokens) if index[n] == place) for place in range(found.num_tokens)}
        assert groups == groups_by_hand(metric[sample].float(), r, protected_places(**options))
        assert [index[home] for home in found.kept[sample].tolist()] == list(range(found.num_tokens))


@given(st.integers(4, 13), st.integers(0, 5), st.integers(0, 999))
def test_protected_tokens_stay_alone_and_in_front(tokens: int, prefix: int, seed: int) -> None:
    metric = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))
    options = {"class_token": prefix > 0, "distill_token": prefix > 1, "registers": max(0, prefix - 2)}
    found = bipartite_soft_matching(metric, tokens, **options)
    front = min(prefix, tokens)
    assert found.kept[0, :front].tolist() == list(range(front))
    assert (found.source().sum(-1)[0, :front] == 1).all()
    assert found.num_tokens == tokens - max(0, tokens - prefix) // 2


def test_what_is_left_of_the_first_half_is_in_order_with_a_class_token_else_by_similarity() -> None:
    metric = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(1))
    with_class = bipartite_soft_matching(metric, 4, class_token=True).kept[0, :6]
    assert with_class.tolist() == sorted(with_class.tolist())
    unit = torch.nn.functional.normalize(metric[0], dim=-1)
    best = (unit[::2] @ unit[1::2].T).amax(-1)
    left = bipartite_soft_matching(metric, 4).kept[0, :6]
    assert left.tolist() == (best.argsort(descending=True)[4:] * 2).tolist()


def test_ties_go_to_the_lower_place() -> None:
    found = bipartite_soft_matching(torch.ones(1, 8, 2), 2)
    assert found.index.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]


@pytest.mark.parametrize("name", ["merge_cls", "merge_nocls_even"])
def test_like_tome(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        options = json.loads(file.metadata()["kwargs"])
    found = bipartite_soft_matching(tensors["in.metric"], options["r"], class_token=options["class_token"])
    tokens = tensors["in.x"]
    merged = found.merge(tokens, tensors["in.size"][..., 0])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(merged.tokens, tensors["out.merged_x"], **close)
    torch.testing.assert_close(merged.sizes, tensors["out.merged_size"][..., 0], **close)
    torch.testing.assert_close(found.unmerge(merged.tokens), tensors["out.unmerged_x"], **close)
    for reduce in ("sum", "mean", "amax"):
        torch.testing.assert_close(found.merge(tokens, reduce=reduce).tokens, tensors[f"out.merge_{reduce}"], **close)
    assert torch.equal(found.source(), tensors["out.source"])
    assert torch.equal(found.merge(tokens, reduce="amax").sizes, tensors["out.source"].sum(-1))


def test_a_few_rows_at_a_time_give_the_same(monkeypatch) -> None:
    metric = torch.randn(3, 31, 5, generator=torch.Generator().manual_seed(0))
    whole = bipartite_soft_matching(metric, 9, class_token=True)
    monkeypatch.setattr(module, "_MAX_SCORES", 100)
    assert torch.equal(bipartite_soft_matching(metric, 9, class_token=True).index, whole.index)


def test_similarity_is_in_float32_even_under_autocast_and_the_tokens_carry_the_gradient() -> None:
    metric = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    expected = bipartite_soft_matching(metric, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bipartite_soft_matching(metric, 15).index, expected.index)
    half = metric.bfloat16()
    assert torch.equal(bipartite_soft_matching(half, 15).index, bipartite_soft_matching(half.float(), 15).index)
    tokens = torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.rand(2, 40, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: expected.merge(x, sizes).tokens, (tokens,))
    assert torch.autograd.gradcheck(lambda x: expected.merge(x, reduce="amax").tokens, (tokens,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bipartite_soft_matching(torch.ones(4, 2), 1), UsageError, r"\(4, 2\), expected floating-point \(B, N"),
        (lambda: bipartite_soft_matching(torch.ones(1, 4, 2).long(), 1), UsageError, "torch.int64"),
        (lambda: bipartite_soft_matching(torch.ones(1, 4, 2), 1, registers=-1), UsageError, "registers=-1"),
        (lambda: EVERYONE.merge(torch.ones(1, 4, 2), reduce="men"), UnknownName, "did you mean 'mean'"),  # type: ignore[arg-type]
        (lambda: EVERYONE.merge(torch.ones(1, 3, 2)), UsageError, "index has shape"),
        (lambda: EVERYONE.merge(torch.ones(1, 4, 2), torch.ones(1, 3), reduce="amax"), UsageError, "sizes are"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


EVERYONE = bipartite_soft_matching(torch.ones(1, 4, 2), 0)
