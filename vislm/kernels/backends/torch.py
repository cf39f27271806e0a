"""Attention in plain PyTorch on any device, differentiable, O(N) memory: fused, tiled on grids, or row by row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vislm.kernels.bias_rows import grid_sizes
from vislm.kernels.fused import fused_output
from vislm.kernels.local.axis import axis_of
from vislm.kernels.local.measure import local_statistics
from vislm.kernels.local.run import local_output
from vislm.kernels.patterns import Dense, GridPattern, Masked
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.rows import row_output
from vislm.kernels.statistics import Statistics
from vislm.kernels.sweep import sweep
from vislm.kernels.tiled_statistics import named_groups, tiled_statistics, visits_every_query, with_chosen


def supports(request: AttentionRequest) -> str | None:
    """Return None: every pattern, bias, normalisation and statistic runs, on every device."""
    return None


def run(request: AttentionRequest) -> Answer:
    """Return output and statistics.

    Patterns on a grid run tile by tile, softmax otherwise in a fused call, and sigmoid from explicit rows, a few at a
    time. Statistics never change the output.
    """
    if isinstance(request.pattern, GridPattern) and request.bias is None and _sees_everything(request.pattern):
        request = replace(request, pattern=Dense())
    if _runs_in_tiles(request):
        return _on_grid(request)
    explicit = request.normalize != "softmax"
    if request.differentiable or not (explicit or visits_every_query(request.statistics)):
        output = None
        if request.value is not None:
            output = row_output(request, request.value) if explicit else fused_output(request, request.value)
        return Answer(output, tiled_statistics(request, output))
    if explicit or request.value is None:
        swept = sweep(request)
        output = None if swept.output is None else swept.output.to(request.query.dtype)
    else:  # the same output as without statistics, to the last bit
        swept, output = sweep(replace(request, value=None)), fused_output(request, request.value)
    everywhere = Statistics(
        lse=swept.lse,
        entropy=swept.entropy,
        maximum=swept.maximum,
        mass=named_groups(request.statistics.mass, swept.mass),
        received=swept.received,
    )
    return Answer(output, with_chosen(everywhere, request, output))


def _sees_everything(pattern: GridPattern) -> bool:
    """Return whether every query sees every key: the window is the whole grid."""
    axes = (axis_of(pattern, axis) for axis in range(len(pattern.grid)))
    return all(bool((axis.first == 0).all() & (axis.last == axis.keys - 1).all()) for axis in axes)


def _runs_in_tiles(request: AttentionRequest) -> bool:
    pattern, normalize = request.pattern, request.normalize
    if not isinstance(pattern, GridPattern) or isinstance(request.bias, Tensor):
        return False
    # The rows of prefix queries are computed apart, where their position on the key axis is another.
    return normalize == "softmax" or normalize.row_norm is None or pattern.prefix == 0


def _on_grid(request: AttentionRequest) -> Answer:
    """Return the answer of the prefix queries, which see every key, and behind it that of the grid's queries."""
    wanted = request.statistics
    beyond_lse = visits_every_query(replace(wanted, lse=False))
    prefix_request = _of_prefix_queries(request)
    prefix = None if prefix_request is None else run(prefix_request)
    output = lse = None
    if request.value is not None:
        output, lse = local_output(request, request.value, wants_lse=wanted.lse and not beyond_lse)
        output = _behind(None if prefix is None else prefix.output, output)
    if request.differentiable and (beyond_lse or (wanted.lse and lse is None)):
        return Answer(output, tiled_statistics(request, output))
    if beyond_lse or (wanted.lse and lse is None):
        grid = local_statistics(request)
    else:
        grid = Statistics(lse=lse)
    return Answer(output, with_chosen(_joined(None if prefix is None else prefix.statistics, grid), request, output))


def _of_prefix_queries(request: AttentionRequest) -> AttentionRequest | None:
    """Return the call of the prefix queries alone: they see every key, without a bias; None if there are none."""
    pattern, wanted = request.pattern, request.statistics
    assert isinstance(pattern, GridPattern)
    count = request.shape.num_queries - grid_sizes(pattern)[0]
    if count == 0:
        return None
    where = None if wanted.received_where is None else wanted.received_where[:, :count]
    statistics = replace(wanted, rows=None, received_queries=None, received_where=where, output_norm=False)
    query = request.query[:, :, :count]
    seen = Dense()
    if any(pattern.margin):  # the zero keys around the grid are none of theirs
        key_index = torch.arange(request.shape.num_keys, device=query.device)[None]
        seen = Masked(pattern.mask(torch.zeros_like(key_index[:, :1]), key_index)).fit(
            request.shape._replace(num_queries=count)
        )
    return replace(request, query=query, pattern=seen, bias=None, statistics=statistics)


def _joined(prefix: Statistics | None, grid: Statistics) -> Statistics:
    """Return the statistics of the prefix queries and of the grid's queries together."""
    if prefix is None:
        return grid
    received = grid.received
    if received is not None and prefix.received is not None:
        received = prefix.received + received
    mass = grid.mass
    if mass is not None:
        mass = {name: _behind((prefix.mass or {})[name], part) for name, part in mass.items()}
    return replace(
        grid,
        lse=None if grid.lse is None else _behind(prefix.lse, grid.lse),
        entropy=None if grid.entropy is None else _behind(prefix.entropy, grid.entropy),
        maximum=None if grid.maximum is None else _behind(prefix.maximum, grid.maximum),
        mass=mass,
        received=received,
    )


def _behind(prefix: Tensor | None, grid: Tensor) -> Tensor:
    return grid if prefix is None else torch.cat((prefix, grid), dim=2)
