"""The training-free use in a diffusion model: matching, merging, attention by way of agents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from vislm.attention import agent_sd
from vislm.attention.agent_sd import RECIPE, AgentSD, agent_self_attention, match_cells
from vislm.errors import UsageError


def by_hand(x, grid, cell, ratio):
    """Return the merged token of each token of one sample (N, C), by loops."""
    height, width = grid
    destinations = [
        row * width + column
        for row in range(0, height - cell[0] + 1, cell[0])
        for column in range(0, width - cell[1] + 1, cell[1])
    ]
    sources = [token for token in range(height * width) if token not in destinations]
    scores = {
        source: torch.stack([cosine_similarity(x[source], x[d], dim=0) for d in destinations]) for source in sources
    }
    best = sorted(sources, key=lambda source: -scores[source].max().item())[: min(int(len(x) * ratio), len(sources))]
    target = {source: destinations[int(scores[source].argmax())] for source in best}
    merged = x.clone()
    for destination in destinations:
        group = [destination, *(source for source in best if target[source] == destination)]
        merged[group] = x[group].mean(dim=0)
    return merged, len(x) - len(best)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    cell=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_merging_equals_loops(grid, cell, ratio) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1], 5)
    matching = match_cells(x, grid, AgentSD(cell=cell, ratio=ratio))
    merged = matching.features(x)
    for sample, ours in zip(x, matching.unmerge(merged), strict=True):
        theirs, count = by_hand(sample, grid, cell, ratio)
        assert merged.shape[1] == matching.num_features == count
        torch.testing.assert_close(ours, theirs)


def test_features_come_in_the_order_of_their_similarity() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 36, 4)
    matching = match_cells(x, (6, 6), AgentSD(cell=3, ratio=0.25))
    kept = matching.features(x)[0, : matching.num_features - 4]
    corners = x[0, [0, 3, 18, 21]]
    scores = cosine_similarity(kept[:, None], corners[None], dim=-1).amax(dim=1)
    assert torch.equal(scores, scores.sort(descending=True).values)
    torch.testing.assert_close(kept, x[0, [(x[0] == token).all(-1).nonzero().item() for token in kept]])


def test_similarities_in_parts_are_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 48, 4)
    whole = match_cells(x, (6, 8), AgentSD())
    monkeypatch.setattr(agent_sd, "ROWS", 5)
    parts = match_cells(x, (6, 8), AgentSD())
    assert torch.equal(parts.feature_index, whole.feature_index)


def test_random_destinations_lie_in_their_cells() -> None:
    x = torch.randn(3, 48, 4)
    options = AgentSD(cell=(2, 4), ratio=1.0)
    first, again = (match_cells(x, (6, 8), options, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(first.feature_index, again.feature_index)
    other = match_cells(x, (6, 8), options, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first.feature_index, other.feature_index)
    assert first.num_features == 6


def test_attention_by_way_of_agents() -> None:
    torch.manual_seed(0)
    to_q, to_k, to_v = (nn.Linear(12, 16, bias=False) for _ in range(3))
    to_out, options = nn.Linear(16, 12), AgentSD(cell=4, ratio=0.4, agent_ratio=0.9, k_scale2=0.3, k_shortcut=0.2)
    x = torch.randn(2, 64, 12, requires_grad=True)
    matching = match_cells(x, (8, 8), options)
    features, agents = matching.features(x), matching.agents(x)
    assert agents is not None

    def split(tokens):
        return tokens.unflatten(2, (2, 8)).transpose(1, 2)

    query, key, value, agent = split(to_q(features)), split(to_k(features)), split(to_v(features)), split(to_q(agents))
    gathered = (agent @ key.mT * 8**-0.5).softmax(-1) @ value
    out = (query @ agent.mT * 8 ** (-0.15)).softmax(-1) @ gathered + 0.2 * value
    expected = matching.unmerge(to_out(out.transpose(1, 2).flatten(2)))
    ours = agent_self_attention(x, matching, to_q, to_k, to_v, to_out, 2, options)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_without_merges_it_is_the_attention_itself() -> None:
    torch.manual_seed(0)
    to_q, to_k, to_v, to_out = (nn.Linear(8, 8) for _ in range(4))
    options = AgentSD(ratio=0.0, agent_ratio=0.0)
    x = torch.randn(2, 30, 8)
    matching = match_cells(x, (5, 6), options)
    assert matching.agents(x) is None
    query, key, value = (project(x).unflatten(2, (2, 4)).transpose(1, 2) for project in (to_q, to_k, to_v))
    plain = to_out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    ours = agent_self_attention(x, matching, to_q, to_k, to_v, to_out, 2, options)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_agents_only_where_they_save() -> None:
    x = torch.randn(1, 64 * 64, 4)
    early, late = (match_cells(x, (64, 64), options) for _, options in RECIPE)
    assert (early.num_features, early.num_agents) == (4096 - 1638, 4096 - 3840)
    assert early.agents(x) is not None
    assert late.agents(x) is None
    assert [step for step, _ in RECIPE] == [0, 20]


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="ratios from 0 to 1"):
        AgentSD(ratio=1.5)
    with pytest.raises(UsageError, match="positive cells"):
        AgentSD(cell=0)
    with pytest.raises(UsageError, match="do not fit into the grid"):
        match_cells(torch.zeros(1, 9, 4), (3, 3), AgentSD(cell=4))
    with pytest.raises(UsageError, match=r"\(B, 12, 4\)"):
        match_cells(torch.zeros(1, 9, 4), (3, 4), AgentSD())
