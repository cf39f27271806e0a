"""Agent attention: queries ask a few agents, each of which has gathered from all keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vislm.attention.agent_core import AgentCore
from vislm.attention.agent_cswin import AgentCswinAttention
from vislm.attention.tokens import split_heads
from vislm.errors import UsageError
from vislm.kernels import StatisticsRequest, attention_statistics
from vislm.report.attention_views.panel import Layer, Panel, array
from vislm.report.attention_views.rows import WEIGHTS, Row, checked_head, on_grid, query_weights


class AgentMaps(NamedTuple):
    """Both attentions of a query.

    Attributes:
        shares: ``(H, a, b)``, what the query gives to each agent.
        gathered: ``(H, a, b, h, w)``, what each agent gives to the patches.
        row: what the query gives to the patches through all agents.
    """

    shares: np.ndarray
    gathered: np.ndarray
    row: Row


def agent_maps(layer: Layer, place: tuple[int, int]) -> AgentMaps:
    """Return both attentions of a patch in ``agent`` and ``agent_cswin`` attention.

    Where keys are reduced (``sr_ratio``), each patch has the weight of the key that stands for it.

    Raises:
        UsageError: stripes with agents of their own.
    """
    core, query, key, cell = _operands(layer)
    heads, shape, prefix = core.num_heads, core.agent_shape, layer.num_prefix
    key_grid = tuple(-(-side // cell) for side in layer.grid)
    agents = split_heads(core.pooled(query[:, prefix:], layer.grid), heads)
    gathered = attention_statistics(
        agents,
        split_heads(key, heads),
        request=StatisticsRequest(rows=torch.arange(agents.shape[2])),
        bias=core.agent_to_key(key_grid, shape),
        scale=core.scale,
    ).rows
    assert gathered is not None
    maps, bias = array(gathered[0]), core.query_to_agent(layer.grid, shape)
    shares = query_weights(split_heads(query, heads), agents, layer.token(place), bias=bias, scale=core.scale)
    read = on_grid((shares[:, None] @ maps)[:, 0], key_grid)
    patches = maps[:, :, prefix:].reshape(heads, *shape, *key_grid)
    return AgentMaps(
        shares.reshape(heads, *shape),
        _of_patches(patches, cell, layer.grid),
        Row(_of_patches(read.weights, cell, layer.grid), read.beside),
    )


def agent_cells(grid: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return which agent, row-major, each patch is pooled to; of two (cells may overlap) the later one."""
    row, column = (np.arange(side) * count // side for side, count in zip(grid, shape, strict=True))
    return row[:, None] * shape[1] + column


def agent_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``agent`` and ``agent_cswin`` attention."""
    maps = agent_maps(layer, place)
    count, *shape = maps.shares.shape
    chosen = [checked_head(head, count) for head in heads] or list(range(count))
    if heads:
        of = f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))} of {count}"
    else:
        of = f"mean of {count} heads" if count > 1 else "the only head"
    shares, gathered, read = (part[chosen].mean(axis=0) for part in (maps.shares, maps.gathered, maps.row.weights))
    cells = agent_cells(layer.grid, shape)
    return [
        Panel("what the model sees", f"{shape[0]} x {shape[1]} agents are means over these cells", regions=cells),
        Panel("query to agents", of, 100 * shares.reshape(-1)[cells], WEIGHTS, regions=cells),
        Panel("agents to patches", "for each agent a small map", 100 * gathered, WEIGHTS),
        Panel("query to patches", "through all agents", 100 * read, WEIGHTS),
    ]


def _operands(layer: Layer) -> tuple[AgentCore, Tensor, Tensor, int]:
    """Return what attends, queries and keys ``(1, N, C)``, and patches along each side of a key."""
    attention = layer.attention
    if not isinstance(attention, AgentCswinAttention):
        query, key, _ = attention.projected(layer.x, layer.grid)
        return attention, query, key, attention.sr_ratio
    if len(attention.attns) > 1:
        raise UsageError("there is no picture of stripes with agents of their own (agent_cswin with a split_size)")
    query, key, _ = attention.qkv(layer.x).chunk(3, dim=-1)
    core = attention.attns[0]
    assert isinstance(core, AgentCore)
    return core, query, key, 1


def _of_patches(maps: np.ndarray, cell: int, grid: Sequence[int]) -> np.ndarray:
    """Return maps ``(.., h / cell, w / cell)`` as ``(.., h, w)``."""
    return maps.repeat(cell, axis=-2).repeat(cell, axis=-1)[..., : grid[0], : grid[1]]
