"""Active and dormant heads: entropy of a head's rows and columns, and what becomes of the model without them.

A dormant head gives its attention to the first token, so that its rows are sharp and one column gets something from
every row. Source: Guo et al., "Active-Dormant Attention Heads", arXiv 2410.13835;
github.com/GuoTianYu2000/Active-Dormant-Attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.rows import MatrixRows, RowSource, row_pieces
from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import EditStage, EditView


@dataclass
class HeadEntropy:
    """Entropies of one attention, divided by their largest possible value."""

    rows: Tensor
    """(B, H, T) of each row over the keys that it sees; 0 where it sees one alone."""
    columns: Tensor
    """(B, H, T) of each column over the rows that see it; 0 where one alone does."""
    valid: Tensor
    """(B, T) bool."""

    @property
    def row_mean(self) -> Tensor:
        """(B, H): the head's value of its rows."""
        return (self.rows * self.valid[:, None]).sum(-1) / self.valid.sum(-1)[:, None]

    @property
    def column_max(self) -> Tensor:
        """(B, H): the head's value of its columns."""
        return self.columns.amax(-1)

    def dormant(self, row_threshold: float, column_threshold: float) -> Tensor:
        """Return (B, H) bool: heads whose rows are sharper than one threshold and a column flatter than the other."""
        return (self.row_mean < row_threshold) & (self.column_max > column_threshold)


def head_entropy(source: RowSource | Tensor, valid: Tensor | None = None, causal: bool = True) -> HeadEntropy:
    """Return the entropies of one attention, from its rows.

    Args:
        source: the attention, or its matrix (B, H, T, T).
        valid: (B, T) bool, False on padding (on the left).
        causal: a row sees earlier keys alone; False: all of them.

    Raises:
        UsageError: more keys than queries.
    """
    source = MatrixRows(source) if isinstance(source, Tensor) else source
    batch, _, queries, keys = source.shape
    if queries != keys:
        raise UsageError(f"entropies of columns are defined for a whole prompt: got {queries} queries, {keys} keys")
    total = self_information = None
    parts = []
    for index, rows in row_pieces(source):
        if valid is None:
            valid = torch.ones(batch, keys, dtype=torch.bool, device=rows.device)
        rows = rows * valid[:, None, index, None]
        share = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        parts.append(-torch.xlogy(share, share).sum(-1))
        column, information = rows.sum(-2), torch.xlogy(rows, rows).sum(-2)
        total = column if total is None else total + column
        self_information = information if self_information is None else self_information + information
    assert valid is not None
    assert total is not None
    assert self_information is not None
    # -sum p ln p with p = a / s is ln s - (sum a ln a) / s
    known = total > 0
    raw = torch.where(known, total.clamp(min=1e-38).log() - self_information / total.clamp(min=1e-38), 0.0)
    seen = seeing = valid.sum(-1, keepdim=True).expand_as(valid).float()
    if causal:
        seen, seeing = valid.cumsum(-1).float(), valid.flip(-1).cumsum(-1).flip(-1).float()
    return HeadEntropy(_over_log(torch.cat(parts, -1), seen, valid), _over_log(raw, seeing, valid), valid)


def _over_log(entropy: Tensor, count: Tensor, valid: Tensor) -> Tensor:
    """Return entropy (B, H, T) over ln count (B, T); 0 where only one thing counts."""
    many = (count > 1) & valid
    scaled = entropy / torch.where(many, count, 2.0).log()[:, None]
    return scaled.masked_fill(~many[:, None], 0.0)


def value_norm_ratio(value: Tensor, valid: Tensor, heads: int) -> Tensor:
    """Return (B, H): ||v|| of the first valid token over the mean ||v_k||; sinks of dormant heads have small values.

    Args:
        value: (B, G, T, d), G key-value heads.
        valid: (B, T) bool.
        heads: H, a multiple of G.
    """
    norms = value.float().norm(dim=-1).repeat_interleave(heads // value.shape[1], 1)
    first = valid.to(torch.int8).argmax(-1)
    own = norms.gather(-1, first[:, None, None].expand(-1, heads, 1))[..., 0]
    return own / ((norms * valid[:, None]).sum(-1) / valid.sum(-1)[:, None])


def zeroed(attention: Tensor, heads: Tensor) -> Tensor:
    """Return attention (B, H, Q, K) with the matrices of chosen heads (B, H) bool set to zero."""
    return attention.masked_fill(heads[..., None, None], 0.0)


def moved_to_first(attention: Tensor, heads: Tensor, first: Tensor | None = None) -> Tensor:
    """Return attention (B, H, Q, K) whose chosen heads (B, H) look at one key only, the first (valid) one (B,)."""
    key = torch.zeros(attention.shape[0], dtype=torch.long, device=attention.device) if first is None else first
    columns = torch.arange(attention.shape[-1], device=attention.device)
    one_hot = (columns == key[:, None])[:, None, None].to(attention.dtype)
    return torch.where(heads[..., None, None], one_hot.expand_as(attention), attention)


@dataclass(frozen=True)
class DormantHeads:
    """Make chosen heads dormant while the model runs: their attention is zero, or on the first token alone."""

    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Decoder layer -> heads."""
    mode: Literal["zero", "first"] = "zero"
    name = "dormant_heads"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none without heads."""
        if self.mode not in ("zero", "first"):
            raise UsageError(f"mode={self.mode!r}: expected 'zero' or 'first'")
        count = adapter.text_config.num_attention_heads
        wrong = [(layer, h) for layer, heads in self.heads.items() for h in heads if not 0 <= h < count]
        if wrong:
            raise UsageError(f"head {wrong[0][1]} of layer {wrong[0][0]}: the model has heads 0..{count - 1}")
        layers = frozenset(layer for layer, heads in self.heads.items() if heads)
        if not layers:
            return []
        return [EditStage(layers, self._edit, "all", heads=lambda n: self.heads[n], every_sample=True)]

    def _edit(self, view: EditView) -> Tensor:
        everyone = torch.ones(view.logits.shape[:2], dtype=torch.bool, device=view.logits.device)
        if self.mode == "zero":
            return torch.zeros_like(view.logits)
        return moved_to_first(view.logits, everyone, view.keys.first)
