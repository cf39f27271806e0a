"""The one attention function that vislm registers with transformers.

It computes what ``sdpa`` computes, with the same call. If a session watches the module, it then hands the session the
tensors of that call and lets it replace the heads' output; a session may also say beforehand that it computes the
output itself. Modules that nobody watches pay two dictionary look-ups.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vislm import kernels
from vislm.lmm.decoder.grouped_heads import mixtures, products

NAME = "vislm"


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of one attention, as transformers passes them.

    Shapes: query (B, H, Nq, d); key and value (B, G, Nk, d) with H a multiple of G, after the rotary embedding and the
    cache; mask (B or 1, 1, Nq, Nk) bool with True = may attend, or additive float, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float

    def pattern(self) -> kernels.Pattern:
        """Return which pairs attend in this call."""
        if self.mask is not None and self.mask.dtype == torch.bool:
            return kernels.Masked(self.mask)
        return kernels.Causal() if self.is_causal else kernels.Dense()

    def statistics(self, request: kernels.StatisticsRequest) -> kernels.Statistics:
        """Return statistics of this attention without its matrix (see ``vislm.kernels``)."""
        bias = self.mask if self.mask is not None and self.mask.dtype.is_floating_point else None
        return kernels.attention_statistics(
            self.query, self.key, self.value, request=request, pattern=self.pattern(), bias=bias, scale=self.scale
        )

    @property
    def sees_all(self) -> bool:
        """Whether every row may attend to every key, as far as that is known without looking at a mask."""
        return self.mask is None and (not self.is_causal or self.query.shape[2] == self.key.shape[2] == 1)

    def logits(self, rows: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Return q . k scale (B, H', R, Nk) of the rows (R,) in float32, before masking; ``heads`` None: all."""
        query = self.query if self.query.shape[2] == 1 else self.query[:, :, rows]
        return products(query.float() * self.scale, self.key, heads)

    def allowed(self, rows: Tensor) -> Tensor:
        """Return (B or 1, 1, R, Nk) bool: the keys that each row may attend to."""
        keys = self.key.shape[2]
        if self.mask is not None:
            chosen = self.mask[:, :1, rows]
            return chosen if chosen.dtype == torch.bool else chosen > torch.finfo(chosen.dtype).min / 2
        columns = torch.arange(keys, device=rows.device)
        last = rows + (keys - self.query.shape[2]) if self.is_causal else torch.full_like(rows, keys)
        return (columns <= last[:, None])[None, None]

    def mix(self, weights: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Return weights (B, H', R, Nk) times the values, (B, R, H', d), in float32."""
        return mixtures(weights.float(), self.value, self.query.shape[1], heads).transpose(1, 2)

    def rows(self, queries: Tensor) -> Tensor:
        """Return the softmaxed attention rows (B, H, R, Nk) of the chosen queries (R,), in float32."""
        rows = self.statistics(kernels.StatisticsRequest(rows=queries)).rows
        assert rows is not None
        return rows


Site = Callable[[AttentionCall, Tensor], Tensor]
"""Gets the call and the heads' output (B, Nq, H, d); returns the output to use."""

Around = Callable[[AttentionCall, Callable[[], Tensor]], Tensor]
"""Gets the call, and what computes the heads' output (B, Nq, H, d); returns the output, with or without computing."""

LogitBias = Callable[[int, int], Tensor | None]
"""Gets the numbers of queries and keys; returns what is added to the logits (B, 1 or H, Nq, Nk), or None."""

_SITES: weakref.WeakKeyDictionary[nn.Module, Site] = weakref.WeakKeyDictionary()
_AROUND: weakref.WeakKeyDictionary[nn.Module, Around] = weakref.WeakKeyDictionary()
_BIASES: weakref.WeakKeyDictionary[nn.Module, LogitBias] = weakref.WeakKeyDictionary()


def watch(module: nn.Module, site: Site) -> None:
    """Call ``site`` at every attention of ``module`` until ``unwatch``."""
    _SITES[module] = site


def surround(module: nn.Module, around: Around) -> None:
    """Let ``around`` compute every attention of ``module`` until ``unwatch``; ``watch`` sees its output."""
    _AROUND[module] = around


def bias(module: nn.Module, source: LogitBias) -> None:
    """Add what ``source`` returns to the logits of every attention of ``module`` until ``unwatch``."""
    _BIASES[module] = source


def unwatch(module: nn.Module) -> None:
    """Stop watching ``module``, computing its attention, and adding to its logits."""
    _SITES.pop(module, None)
    _AROUND.pop(module, None)
    _BIASES.pop(module, None)


def add_to_mask(mask: Tensor | None, addend: Tensor, is_causal: bool, dtype: torch.dtype) -> Tensor:
    """Return one additive mask (B, 1 or H, Nq, Nk) that stands for ``mask`` (bool, additive or None) and ``addend``."""
    total = addend.to(torch.float32)
    lowest = torch.finfo(dtype).min
    if mask is None and is_causal:
        queries, keys = total.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=total.device).tril(keys - queries)
    if mask is None:
        return total.to(dtype)
    if mask.dtype == torch.bool:
        return total.masked_fill(~mask, lowest).to(dtype)
    return (total + mask.float()).clamp(min=lowest).to(dtype)


def vislm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return sdpa's output (B, Nq, H, d), passed through the site that watches ``module``, if any."""
    queries = query.shape[2]
    causal = (
        attention_mask is None and queries > 1 and bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
    )
    if causal and key.shape[2] > queries:  # the empty tail of a static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
    source = _BIASES.get(module)
    addend = None if source is None else source(queries, key.shape[2])
    if addend is not None:
        attention_mask, causal = add_to_mask(attention_mask, addend, causal, query.dtype), False

    def fused() -> Tensor:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,  # pyright: ignore[reportArgumentType]
        )[0]

    site, around = _SITES.get(module), _AROUND.get(module)
    if site is None and around is None:
        return fused(), None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = AttentionCall(query, key, value, attention_mask, causal, scale)
    out = fused() if around is None else around(call, fused)
    return (out if site is None else site(call, out)), None


# Without its own mask function transformers would build no mask for this name, and padded batches would silently
# attend to their padding.
AttentionInterface.register(NAME, vislm_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
