"""The position biases of agent attention, resized to any grid and any number of agents.

Source: Agent Attention (arXiv 2312.08874); https://github.com/LeapLabTHU/Agent-Attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vislm.attention.remembered import Remembered

BLOCK = (7, 7)
"""Size of the block tables, whatever the resolution."""


class AgentBias(nn.Module):
    """Learned logits between agents and places of a map, per head; subclasses use the tables.

    Each of the two biases is the sum of a 7x7 block table, resized, of one logit per row and one per column:

    ==========  ========================  ===========================================================
    table       shape                     meaning
    ==========  ========================  ===========================================================
    an_bias     ``(H, n, 7, 7)``          agents to keys: block
    ah_bias     ``(1, H, n, h_k, 1)``     agents to keys: row
    aw_bias     ``(1, H, n, 1, w_k)``     agents to keys: column
    na_bias     ``(H, n, 7, 7)``          queries to agents: block
    ha_bias     ``(1, H, h_q, 1, n)``     queries to agents: row
    wa_bias     ``(1, H, 1, w_q, n)``     queries to agents: column
    ac_bias     ``(1, H, n, R)``          agents to prefix tokens, if there are any
    ca_bias     ``(1, H, R, n)``          prefix tokens to agents, if there are any
    ==========  ========================  ===========================================================

    On another grid the tables are resized over space, bilinearly with half-pixel centres; with agents pooled to another
    shape, the agent axis, seen as a map, is resized after that. On the tables' own grid and shape this is the
    classification models' form exactly.

    Args:
        num_heads: H.
        agent_side: a; the tables are for ``n = a^2`` agents, row-major.
        query_grid: the tables' ``(h_q, w_q)``.
        key_grid: the tables' ``(h_k, w_k)``.
        num_prefix_tokens: R.
    """

    def __init__(
        self,
        num_heads: int,
        agent_side: int,
        query_grid: tuple[int, int],
        key_grid: tuple[int, int],
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.agent_side, agents = agent_side, agent_side**2
        self.remembered = Remembered(), Remembered()
        (query_rows, query_columns), (key_rows, key_columns) = query_grid, key_grid
        self.an_bias = _table(num_heads, agents, *BLOCK)
        self.na_bias = _table(num_heads, agents, *BLOCK)
        self.ah_bias = _table(1, num_heads, agents, key_rows, 1)
        self.aw_bias = _table(1, num_heads, agents, 1, key_columns)
        self.ha_bias = _table(1, num_heads, query_rows, 1, agents)
        self.wa_bias = _table(1, num_heads, 1, query_columns, agents)
        self.ac_bias = self.ca_bias = None
        if num_prefix_tokens:
            self.ac_bias = _table(1, num_heads, agents, num_prefix_tokens)
            self.ca_bias = _table(1, num_heads, num_prefix_tokens, agents)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        return {name for name, _ in self.named_parameters(recurse=False) if name.endswith("_bias")}

    def agent_to_key(self, grid: Sequence[int], agent_shape: tuple[int, int]) -> Tensor:
        """Return ``B1 (1, H, n', R + N)``: logits of prefix and grid tokens as keys of the agents."""
        tables = (self.an_bias, self.ah_bias, self.aw_bias, self.ac_bias)
        return self._remembered(0, tables, grid, agent_shape, self._agent_to_key)

    def query_to_agent(self, grid: Sequence[int], agent_shape: tuple[int, int]) -> Tensor:
        """Return ``B2 (1, H, R + N, n')``: logits of the agents as keys of prefix and grid tokens."""
        tables = (self.na_bias, self.ha_bias, self.wa_bias, self.ca_bias)
        return self._remembered(1, tables, grid, agent_shape, self._query_to_agent)

    def _remembered(
        self,
        which: int,
        tables: Sequence[Tensor | None],
        grid: Sequence[int],
        shape: tuple[int, int],
        compute: Callable[[Sequence[int], tuple[int, int]], Tensor],
    ) -> Tensor:
        given = [table for table in tables if table is not None]
        return self.remembered[which]((tuple(grid), shape), given, lambda: compute(grid, shape))

    def _agent_to_key(self, grid: Sequence[int], agent_shape: tuple[int, int]) -> Tensor:
        places = _resized(self.an_bias, grid) + _resized((self.ah_bias + self.aw_bias)[0], grid)
        bias = self._to_agents(places, agent_shape)
        if self.ac_bias is None:
            return bias
        return torch.cat((self._to_agents(self.ac_bias[0, ..., None], agent_shape), bias), dim=-1)

    def _query_to_agent(self, grid: Sequence[int], agent_shape: tuple[int, int]) -> Tensor:
        lines = (self.ha_bias + self.wa_bias)[0].permute(0, 3, 1, 2)
        bias = self._to_agents(_resized(self.na_bias, grid) + _resized(lines, grid), agent_shape)
        if self.ca_bias is not None:
            prefix = self._to_agents(self.ca_bias[0].transpose(1, 2)[..., None], agent_shape)
            bias = torch.cat((prefix, bias), dim=-1)
        return bias.transpose(-2, -1)

    def _to_agents(self, places: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return logits ``(H, n, h, w)`` as ``(1, H, n', h w)``."""
        places = places.flatten(2)
        side = self.agent_side
        if shape != (side, side):
            agents = places.transpose(1, 2).unflatten(2, (side, side))
            places = _resized(agents, shape).flatten(2).transpose(1, 2)
        return places[None]


def _table(*shape: int) -> nn.Parameter:
    table = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(table, std=0.02)
    return table


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps ``(A, B, h, w)`` at another size."""
    if maps.shape[2:] == tuple(size):
        return maps
    return interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
