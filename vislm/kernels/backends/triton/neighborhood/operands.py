"""The arguments that the neighborhood kernels share, and their launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.kernels.backends.triton.dense.call import padded, precision
from vislm.kernels.backends.triton.launching import launch
from vislm.kernels.backends.triton.neighborhood.backward_key import neighborhood_backward_key
from vislm.kernels.backends.triton.neighborhood.backward_query import neighborhood_backward_query
from vislm.kernels.backends.triton.neighborhood.config import Kernel, tile_config
from vislm.kernels.backends.triton.neighborhood.forward import neighborhood_forward
from vislm.kernels.backends.triton.neighborhood.plan import TileConfig, Tiles, geometry, key_tiles, query_tiles
from vislm.kernels.patterns.grid import GridPattern

TABLE_COPIES = 32
"""Copies of a table's gradient that the programs spread their atomic additions over."""


@dataclass(frozen=True, eq=False)
class Operands:
    """One call without prefix tokens.

    Attributes:
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hkv, Nk, D)``.
        value: ``(B, Hkv, Nk, Dv)``.
        table: None, or relative logits ``(1 or Hq, S_1, .., S_n)``.
        axial: empty, or per axis of the grid logits ``(B, Hq, Nq, S_a)``.
        key_logits: None, or ``(1 or B, 1 or Hq, Nk)``.
        origins: index of relative position 0 in the table or the axial logits, per axis of the grid.
        pattern: the pattern on the grid.
        scale: factor of the products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor | None
    axial: tuple[Tensor, ...]
    key_logits: Tensor | None
    origins: tuple[int, ...]
    pattern: GridPattern
    scale: float

    def config(self, kernel: Kernel) -> TileConfig:
        """Return the tiles of a kernel for these tensors."""
        widest = padded(max(self.query.shape[-1], self.value.shape[-1]))
        gathers = len(self.axial) if self.table is None else 1
        return tile_config(kernel, widest, self.query.element_size(), gathers)

    def shared(self) -> dict[str, Any]:
        """Return the arguments that all three kernels take."""
        axes = len(self.pattern.grid)
        shape = geometry(self.pattern, self.query.device)
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        sizes = tuple(logits.shape[-1] for logits in self.axial)
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "table": self.table,
            "axial": _three(self.axial, self.axial[0]) if self.axial else None,
            "key_logits": self.key_logits,
            "spans": shape.spans,
            "query_strides": self.query.stride()[:3],
            "key_strides": self.key.stride()[:3],
            "value_strides": self.value.stride()[:3],
            "logits_strides": (0, 0) if self.key_logits is None else _shared_strides(self.key_logits),
            "table_steps": _table_steps(self.table),
            "table_size": 0 if self.table is None else self.table[0].numel(),
            "axial_sizes": _three(sizes, 1),
            "origins": _three(self.origins, 0),
            "query_steps": shape.query_steps,
            "key_steps": shape.key_steps,
            "num_heads": self.query.shape[1],
            "group_size": self.query.shape[1] // self.key.shape[1],
            "num_queries": self.query.shape[2],
            "scale": self.scale * math.log2(math.e),
            "AXES": axes,
            "PRECISION": precision(self.query.dtype),
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": padded(head_dim),
            "BLOCK_V": padded(value_dim),
        }


def launch_forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return the output ``(B, Hq, Nq, Dv)`` and the log-sum-exp ``(B, Hq, Nq)`` in float32."""
    query, pattern = operands.query, operands.pattern
    output = query.new_empty(*query.shape[:3], operands.value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    config = operands.config("forward")
    tiles = query_tiles(pattern, config, query.device)
    programs = len(tiles.table) * query.shape[0] * query.shape[1]
    arguments = {"output": output, "lse": lse, "output_strides": output.stride()[:3]}
    sizes = {"BLOCK_M": tiles.size, "BLOCK_N": config.block}
    _start(neighborhood_forward, programs, operands.shared() | arguments | sizes, tiles, config)
    return output, lse


def launch_backward_query(
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Return ``delta`` and the gradients of the query, and in float32 those of the table and of the axial logits."""
    query, table = operands.query, operands.table
    grad_query, delta = torch.empty_like(query, memory_format=torch.contiguous_format), torch.empty_like(lse)
    wide = {"dtype": torch.float32, "device": query.device}
    copies = torch.zeros(TABLE_COPIES, *table.shape, **wide) if needs_bias and table is not None else None
    grad_axial = tuple(torch.zeros(logits.shape, **wide) for logits in operands.axial) if needs_bias else ()
    config = operands.config("backward_query")
    tiles = query_tiles(operands.pattern, config, query.device)
    programs = len(tiles.table) * query.shape[0] * query.shape[1]
    arguments = {
        "output": output,
        "lse": lse,
        "grad_output": grad_output,
        "grad_lse": grad_lse,
        "delta": delta,
        "grad_query": grad_query,
        "grad_table": copies,
        "grad_axial": _three(grad_axial, grad_axial[0]) if grad_axial else None,
        "output_strides": output.stride()[:3],
        "grad_output_strides": grad_output.stride()[:3],
        "grad_query_strides": grad_query.stride()[:3],
        "num_copies": TABLE_COPIES,
        "copy_size": 0 if table is None else table.numel(),
        "factor": operands.scale,
    }
    sizes = {"BLOCK_M": tiles.size, "BLOCK_N": config.block}
    _start(neighborhood_backward_query, programs, operands.shared() | arguments | sizes, tiles, config)
    return delta, grad_query, None if copies is None else copies.sum(0), grad_axial


def launch_backward_key(
    operands: Operands, lse: Tensor, delta: Tensor, grad_output: Tensor, *, needs_key_logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of key and value, and of key logits as ``(B, Hq, Nk)`` in float32."""
    query, key, value = operands.query, operands.key, operands.value
    grad_key, grad_value = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (key, value))
    logits_shape = (*query.shape[:2], key.shape[2])
    grad_key_logits = query.new_empty(logits_shape, dtype=torch.float32) if needs_key_logits else None
    config = operands.config("backward_key")
    tiles = key_tiles(operands.pattern, config, query.device)
    programs = len(tiles.table) * key.shape[0] * key.shape[1]
    arguments = {
        "lse": lse,
        "grad_output": grad_output,
        "delta": delta,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_key_logits": grad_key_logits,
        "grad_output_strides": grad_output.stride()[:3],
        "grad_key_strides": grad_key.stride()[:3],
        "grad_value_strides": grad_value.stride()[:3],
        "num_keys": key.shape[2],
        "factor": operands.scale,
    }
    sizes = {"BLOCK_M": config.block, "BLOCK_N": tiles.size}
    _start(neighborhood_backward_key, programs, operands.shared() | arguments | sizes, tiles, config)
    return grad_key, grad_value, grad_key_logits


def _start(kernel: Any, programs: int, arguments: dict[str, Any], tiles: Tiles, config: TileConfig) -> None:
    tiling = {"tiles": tiles.table, "num_tiles": len(tiles.table), "MASKED": tiles.masked}
    launch(kernel, programs, arguments | tiling, config.num_warps, config.num_stages)


def _shared_strides(tensor: Tensor) -> tuple[int, int]:
    """Return the strides of batch and head, 0 where that axis is shared."""
    batch, head = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()[:2], strict=False))
    return batch, head


def _table_steps(table: Tensor | None) -> tuple[int, int, int]:
    """Return the steps of the first two of three axes and of the head in a contiguous table."""
    if table is None:
        return 0, 0, 0
    steps = (0,) * (4 - table.ndim) + table.stride()[1:-1]
    return steps[0], steps[1], 0 if len(table) == 1 else table.stride(0)


def _three(entries: tuple[Any, ...], front: Any) -> tuple[Any, Any, Any]:
    """Return one entry per axis of a grid of three axes."""
    first, second, third = (front,) * (3 - len(entries)) + tuple(entries)
    return first, second, third
