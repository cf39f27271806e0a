"""Agent attention without training, for the self-attention of a pretrained diffusion U-Net (AgentSD).

Source: Agent Attention (arXiv 2312.08874), ``agentsd`` in LeapLabTHU/Agent-Attention; token merging after ToMe for SD
(arXiv 2303.17604).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vislm.attention.tokens import check_tokens, merge_heads, per_axis, split_heads
from vislm.errors import UsageError
from vislm.kernels import attend
from vislm.kernels.tokens import gather_tokens, merge_tokens

Projection = Callable[[Tensor], Tensor]
ROWS = 1024
"""Source tokens whose similarities are held at once."""


@dataclass(frozen=True, kw_only=True)
class AgentSD:
    """How to merge and attend.

    Args:
        cell: ``(sy, sx)`` or one number; one destination token per cell.
        ratio: part of the tokens merged away before the attention, 0 to 1.
        agent_ratio: the same for the agents; must be higher to have any.
        k_scale2: factor of the exponent of the second attention's scale, ``D ** (-0.5 * k_scale2)``.
        k_shortcut: how much of the values is added to the output.
    """

    cell: int | Sequence[int] = 2
    ratio: float = 0.5
    agent_ratio: float = 0.8
    k_scale2: float = 0.3
    k_shortcut: float = 0.075

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 and 0 <= self.agent_ratio <= 1) or min(per_axis("cell", self.cell, 2)) < 1:
            raise UsageError(f"{self}, expected ratios from 0 to 1 and positive cells")


RECIPE = ((0, AgentSD(cell=4, ratio=0.4, agent_ratio=0.95)), (20, AgentSD(cell=2, ratio=0.4, agent_ratio=0.5)))
"""First step of 50 (PLMS) -> options, as published; the second half has too few merges for agents: token merging."""


@dataclass(frozen=True, eq=False)
class MergedCells:
    """A matching of tokens: into which place each goes, for features and for agents.

    Attributes:
        feature_index: ``(B, N)``; places are the tokens that stay, the most similar first, then the destinations.
        num_features: places.
        agent_index: the same for the agents, ``(B, N)``; None = too many to be worth it.
        num_agents: places.
    """

    feature_index: Tensor
    num_features: int
    agent_index: Tensor | None
    num_agents: int

    def features(self, x: Tensor) -> Tensor:
        """Return the merged tokens ``(B, num_features, C)``: means of destination and sources."""
        return merge_tokens(x, self.feature_index, self.num_features).tokens

    def agents(self, x: Tensor) -> Tensor | None:
        """Return the agents ``(B, num_agents, C)``, or None."""
        return None if self.agent_index is None else merge_tokens(x, self.agent_index, self.num_agents).tokens

    def unmerge(self, y: Tensor) -> Tensor:
        """Return ``(B, N, C)``: each token's own row of ``y (B, num_features, C)``, or its destination's."""
        return gather_tokens(y, self.feature_index)


def match_cells(
    metric: Tensor, grid: Sequence[int], options: AgentSD, *, generator: torch.Generator | None = None
) -> MergedCells:
    """Return the bipartite matching of a map's tokens: one destination per cell, all others are sources.

    The ``ratio`` of the tokens whose cosine similarity to a destination is highest go into it. Similarities are
    computed in float32, a few rows at a time. Agents are left out unless ``2 (N - r_a) < N - r``.

    Args:
        metric: ``(B, N, C)``, what tokens are compared by: the residual stream.
        grid: ``(H, W)``; tokens outside whole cells are sources.
        options: cells and ratios.
        generator: draws the destination in its cell, the same for the whole batch; None = the upper left token. (The
            official code does that for odd batch sizes too.)

    Raises:
        UsageError: a metric that does not have the grid's tokens, or cells larger than the grid.
    """
    height, width = check_tokens(metric, grid, metric.shape[-1], 0, 2)
    destinations = _destinations((height, width), per_axis("cell", options.cell, 2), generator).to(metric.device)
    is_source = torch.ones(height * width, dtype=torch.bool, device=metric.device)
    is_source[destinations] = False
    sources = is_source.nonzero().flatten()
    directions = normalize(metric.detach().float(), dim=-1)
    targets = directions[:, destinations].transpose(1, 2)
    best = [(rows @ targets).max(dim=-1) for rows in directions[:, sources].split(ROWS, dim=1)]
    nearest = torch.cat([part.indices for part in best], dim=1)
    order = torch.cat([part.values for part in best], dim=1).argsort(dim=1, descending=True, stable=True)
    place = partial(_places, order, nearest, sources, destinations)
    tokens, ratios = height * width, (options.ratio, options.agent_ratio)
    merged, into_agents = (min(int(tokens * ratio), len(sources)) for ratio in ratios)
    num_features, num_agents = tokens - merged, tokens - into_agents
    agent_index = place(into_agents) if 2 * num_agents < num_features else None
    return MergedCells(place(merged), num_features, agent_index, num_agents)


def agent_self_attention(
    x: Tensor,
    matching: MergedCells,
    to_q: Projection,
    to_k: Projection,
    to_v: Projection,
    to_out: Projection,
    num_heads: int,
    options: AgentSD,
) -> Tensor:
    """Return a pretrained self-attention's output ``(B, N, C)``, computed on merged tokens by way of agents.

    ``softmax(q A^T D^(-0.5 k_scale2)) softmax(A k^T D^-0.5) v + k_shortcut v`` with ``A = to_q(agents)``; without
    agents in the matching ordinary softmax attention among the merged tokens.

    Args:
        x: normalised tokens ``(B, N, C)``.
        matching: of :func:`match_cells`.
        to_q, to_k, to_v: the attention's own projections, ``(B, M, C)`` -> ``(B, M, H D)``.
        to_out: ``(B, M, H D)`` -> ``(B, M, C)``.
        num_heads: H.
        options: the same as for the matching.
    """
    return matching.unmerge(
        agent_attention(matching.features(x), matching.agents(x), to_q, to_k, to_v, to_out, num_heads, options)
    )


def agent_attention(
    features: Tensor,
    agents: Tensor | None,
    to_q: Projection,
    to_k: Projection,
    to_v: Projection,
    to_out: Projection,
    num_heads: int,
    options: AgentSD,
) -> Tensor:
    """Return the attention ``(B, M, C)`` of merged tokens ``(B, M, C)`` by way of agents ``(B, n, C)``, if any.

    See :func:`agent_self_attention`.
    """
    query, key, value = (split_heads(project(features), num_heads) for project in (to_q, to_k, to_v))
    if agents is None:
        return to_out(merge_heads(attend(query, key, value)))
    agent, width = split_heads(to_q(agents), num_heads), query.shape[-1]
    gathered = attend(agent, key, value)
    handed_on = attend(query, agent, gathered, scale=width ** (-0.5 * options.k_scale2))
    return to_out(merge_heads(handed_on + options.k_shortcut * value))


def _destinations(grid: tuple[int, int], cell: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return the index of each whole cell's destination, cells row-major."""
    rows, columns = (size // side for size, side in zip(grid, cell, strict=True))
    if rows == 0 or columns == 0:
        raise UsageError(f"cells of {cell} do not fit into the grid {grid}; take smaller ones")
    chosen = torch.zeros(rows, columns, dtype=torch.int64)
    if generator is not None:
        chosen = torch.randint(math.prod(cell), (rows, columns), generator=generator, device=generator.device).cpu()
    row = torch.arange(rows)[:, None] * cell[0] + chosen // cell[1]
    return (row * grid[1] + torch.arange(columns) * cell[1] + chosen % cell[1]).flatten()


def _places(order: Tensor, nearest: Tensor, sources: Tensor, destinations: Tensor, count: int) -> Tensor:
    """Return where each token ``(B, N)`` goes when the ``count`` most similar sources are merged.

    Args:
        order: ranks of the sources by falling similarity, ``(B, S)``.
        nearest: each source's destination, as a number of ``destinations``, ``(B, S)``.
        sources: their tokens ``(S,)``.
        destinations: their tokens ``(D,)``.
        count: how many are merged.
    """
    batch, total = order.shape
    kept, device = total - count, order.device
    place = torch.empty(batch, total + len(destinations), dtype=torch.int64, device=device)
    place[:, destinations] = kept + torch.arange(len(destinations), device=device)
    rank = torch.arange(total, device=device)
    ranked = torch.where(rank < count, kept + nearest.gather(1, order), rank - count)
    place[:, sources] = torch.empty_like(ranked).scatter(1, order, ranked)
    return place
