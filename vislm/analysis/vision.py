"""Attention inside a ViT or another backbone of softmax attention: its rows, without changing the model.

Plain attentions of timm and open_clip are turned into ``dense`` with the same weights for the time of the look (see
:func:`vislm.replace_attention`); ``dense``, ``window`` and ``neighborhood`` of vislm are read as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.dense import DenseAttention
from vislm.attention.neighborhood import NeighborhoodAttention
from vislm.attention.tokens import pad_grid, split_heads
from vislm.attention.window import WindowAttention, padded
from vislm.backbones.replacing import attention_of, replace_attention
from vislm.backbones.replacing_handle import Replacement
from vislm.backbones.replacing_host import ReplacedAttention
from vislm.errors import UsageError
from vislm.kernels import Bias, Dense, Pattern, RelativeBias, StatisticsRequest, attention_statistics

READABLE = ("dense", "neighborhood", "window")
"""Attentions of vislm whose rows are read; plain ones of timm and open_clip become the first."""


@dataclass(frozen=True)
class VisionRows:
    """The attention of B images in one layer, among P prefix tokens and the N patches of a grid."""

    query: Tensor
    key: Tensor
    pattern: Pattern
    bias: Bias | None
    scale: float
    grid: tuple[int, int]
    prefix: int
    prefix_logits: Tensor | None = None
    place: Tensor | None = None
    """(P + N,) where each token lies among the attention's own, which may be padded; None: in order."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, P + N, P + N)."""
        tokens = self.prefix + self.grid[0] * self.grid[1]
        return self.query.shape[0], self.query.shape[1], tokens, tokens

    def rows(self, index: Tensor) -> Tensor:
        """Return the softmaxed rows (B, H, R, P + N), float32; 0 for keys that a query does not see.

        What goes to the padding of a grid that is no multiple of its windows is missing from the sum.
        """
        index = index.cpu() if self.place is None else self.place[index.cpu()]
        if self.prefix_logits is None:
            rows = self._rows(index, self.pattern, self.bias, None)
        else:  # a model whose attention was replaced may give prefix tokens logits of their own
            logits = pad(self.prefix_logits, (0, self.key.shape[2] - self.prefix_logits.shape[-1]))
            logits = logits.unsqueeze(1).expand(-1, len(self.key), -1, -1).to(self.key.dtype)
            rows = self._rows(index, self.pattern, self.bias, logits[0])
            asked = index < self.prefix
            if bool(asked.any()):
                rows[:, :, asked] = self._rows(index[asked], Dense(), None, logits[1])
        return rows if self.place is None else rows[..., self.place]

    def _rows(self, index: Tensor, pattern: Pattern, bias: Bias | None, key_logits: Tensor | None) -> Tensor:
        found = attention_statistics(
            self.query,
            self.key,
            request=StatisticsRequest(rows=index),
            pattern=pattern,
            bias=bias,
            scale=self.scale,
            key_logits=key_logits,
        ).rows
        assert found is not None
        return found.float()


@dataclass(frozen=True)
class Site:
    """One attention that can be read, and whose heads can be switched off."""

    path: str
    """Name in the model, or in the image tower of an open_clip model."""
    module: Any
    """A dense, window or neighborhood attention."""
    block: nn.Module
    """The module around the attention."""

    @property
    def heads(self) -> int:
        """H."""
        return self.module.num_heads


@contextlib.contextmanager
def readable(model: nn.Module) -> Iterator[list[Site]]:
    """Give the attentions of a model in a form that can be read; the model is itself again afterwards.

    Args:
        model: of timm, open_clip (its image tower is read) or vislm, in evaluation mode.

    Raises:
        UsageError: an attention that is no softmax of q k^T over patches.
    """
    tower: nn.Module = getattr(model, "visual", model)
    found = attention_of(tower)
    wrong = [site for site in found if site.attention not in (*READABLE, "softmax")]
    if not found or wrong:
        what = f"{wrong[0].path} is a {wrong[0].attention}" if wrong else f"{type(model).__name__} has no attention"
        raise UsageError(f"{what}; the analysis reads plain attention of timm and open_clip, {', '.join(READABLE)}")
    plain = [site for site in found if site.attention == "softmax"]
    if plain and len(plain) < len(found):
        raise UsageError("the model mixes plain and replaced attentions; undo the replacement, or replace all")
    with contextlib.ExitStack() as stack:
        if plain:
            stack.callback(_replaced(tower, tower.get_submodule(plain[0].path)).undo)
        yield [
            Site(site.path, _inner(tower.get_submodule(site.path)), tower.get_submodule(site.path.rpartition(".")[0]))
            for site in attention_of(tower)
        ]


def _replaced(tower: nn.Module, first: Any) -> Replacement:
    """Put an attention that can be read in place of plain ones; BEiT's table of positions goes on in one window."""
    if getattr(first, "relative_position_bias_table", None) is not None:
        return replace_attention(tower, "window", window_size=tuple(first.window_size))
    return replace_attention(tower, "dense")


@contextlib.contextmanager
def watching(sites: Sequence[Site], see: Callable[[int, VisionRows], None]) -> Iterator[None]:
    """Call ``see(layer, rows)`` at every attention of the forward passes in the context."""
    with contextlib.ExitStack() as stack:
        for number, site in enumerate(sites):

            def hook(module: nn.Module, args: tuple[Any, ...], output: object, n: int = number) -> None:
                see(n, rows_of(module, args[0], (int(args[1][0]), int(args[1][1]))))

            stack.callback(site.module.register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def scaled_heads(sites: Sequence[Site], factors: Callable[[int], Tensor | None]) -> Iterator[None]:
    """Multiply head outputs before the output projection, in the context.

    Args:
        sites: of the model.
        factors: gives the (B, H) factors of a layer, or None.
    """
    with contextlib.ExitStack() as stack:
        for number, site in enumerate(sites):

            def hook(module: nn.Module, args: tuple[Any, ...], n: int = number, heads: int = site.heads) -> Any:
                own = factors(n)
                if own is None:
                    return None
                split = args[0].unflatten(-1, (heads, -1)) * own[:, None, :, None].to(args[0].dtype)
                return (split.flatten(-2), *args[1:])

            stack.callback(site.module.proj.register_forward_pre_hook(hook).remove)
        yield


def rows_of(attention: Any, x: Tensor, grid: tuple[int, int]) -> VisionRows:
    """Return the rows of a dense, window or neighborhood attention for tokens x (B, P + N, C)."""
    prefix, place = attention.num_prefix_tokens, None
    pattern: Pattern = Dense()
    bias: Bias | None = None
    source = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)[None, :, None]
    if isinstance(attention, WindowAttention):
        window = pattern = attention.pattern(grid)
        x, source = padded(x, grid, window), padded(source, grid, window)
        table = attention.relative_position_bias_table
        bias = None if table is None else RelativeBias.swin(table, attention.window_size)
    elif isinstance(attention, NeighborhoodAttention):
        near = pattern = attention.pattern(grid)
        x, source = (pad_grid(tokens, grid, near.grid, prefix) for tokens in (x, source))
        bias = None if attention.rpb is None else RelativeBias(attention.rpb)
    if source.shape[1] != prefix + grid[0] * grid[1]:
        number = source[0, :, 0].long()
        place = number.argsort(stable=True)[int((number == 0).sum()) :]
    query, key, _ = attention.qkv(x).chunk(3, dim=-1)
    query, key = split_heads(query, attention.num_heads), split_heads(key, attention.num_heads)
    own = getattr(attention, "prefix_logits", None)
    return VisionRows(query, key, pattern, bias, attention.scale, grid, prefix, own, place)


def _inner(module: nn.Module) -> nn.Module:
    inner = module.mixer if isinstance(module, ReplacedAttention) else module
    if not isinstance(inner, (DenseAttention, WindowAttention, NeighborhoodAttention)):
        raise UsageError(f"{type(inner).__name__} is not one of {', '.join(READABLE)}")
    return inner
