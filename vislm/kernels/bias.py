"""Forms of additive attention logits that never become an N x N tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vislm.errors import UsageError


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A learned table indexed by the relative position of key and query on a grid; needs a grid pattern.

    ``logit += table[h, (key - query) / dilation + origin]``, with one index per axis. That is the index rule of NAT's
    ``rpb`` (``2 * window - 1`` entries per axis); :meth:`swin` converts Swin's. Prefix tokens get no bias.

    Args:
        table: ``(Hq or 1, S_1, .., S_n)`` for a grid of n axes.
        origin: index of relative position 0 along each axis; None = the middle, ``(S - 1) // 2``.

    Source: NAT (arXiv 2204.07143), Swin (arXiv 2103.14030).
    """

    table: Tensor
    origin: tuple[int, ...] | None = None

    @classmethod
    def swin(cls, table: Tensor, window: int | Sequence[int]) -> RelativeBias:
        """Return the bias of a Swin table ``((2M_1 - 1) ... (2M_n - 1), H)``, which counts query minus key.

        Args:
            table: ``relative_position_bias_table`` of a Swin block; gradients reach it.
            window: the window M, one number (two axes) or one per axis.
        """
        sizes = tuple(window) if isinstance(window, Sequence) else (window, window)
        entries = [2 * size - 1 for size in sizes]
        count = 1
        for entry in entries:
            count *= entry
        if table.ndim != 2 or table.shape[0] != count:
            raise UsageError(
                f"a Swin table for window {sizes} has shape ({count}, H), one row per relative position, but this one "
                f"has {tuple(table.shape)}"
            )
        axes = tuple(range(1, len(sizes) + 1))
        return cls(table.t().reshape(-1, *entries).flip(axes))

    @property
    def origins(self) -> tuple[int, ...]:
        """Index of relative position 0 along each axis."""
        return self.origin or tuple((size - 1) // 2 for size in self.table.shape[1:])


@dataclass(frozen=True, eq=False)
class DecoupledBias:
    """Relative position logits that depend on the query's content: one table of vectors per axis.

    ``logit += sum_a query . tables[a][key_a - query_a + origin_a]``. HaloNet's position term, and the decomposed
    relative position of SAM and ViTDet (whose tables count query minus key: flip them). Prefix tokens get no bias.

    Args:
        tables: per axis of the grid ``(S_a, D)``, shared by heads, or ``(Hq, S_a, D)``.
        origin: index of relative position 0 along each axis; None = the middle, ``(S_a - 1) // 2``.
        scaled: also multiply this term by the attention's ``scale``.

    Source: HaloNet (arXiv 2103.12731), ``timm.layers.halo_attn``.
    """

    tables: tuple[Tensor, ...]
    origin: tuple[int, ...] | None = None
    scaled: bool = False

    @property
    def origins(self) -> tuple[int, ...]:
        """Index of relative position 0 along each axis."""
        return self.origin or tuple((table.shape[-2] - 1) // 2 for table in self.tables)


@dataclass(frozen=True, eq=False)
class AxialBias:
    """Per query and axis, one logit for each relative position: ``logit += sum_a logits[a][query, offset_a]``.

    A :class:`DecoupledBias` becomes this when its query is known.

    Args:
        logits: per axis of the grid ``(B, Hq, Nq, S_a)`` for the queries of the grid (without prefix queries).
        origin: index of relative position 0 along each axis.
    """

    logits: tuple[Tensor, ...]
    origin: tuple[int, ...]

    @property
    def origins(self) -> tuple[int, ...]:
        """Index of relative position 0 along each axis."""
        return self.origin


@dataclass(frozen=True, eq=False)
class LowRankBias:
    """A factored bias: ``logits += query_factor key_factor^T``, computed as R extra query and key channels.

    Memory ``O((Nq + Nk) R)`` instead of ``Nq Nk``, any fused attention runs it, and the factors get gradients. The
    bias is not multiplied by ``scale``. Factors wider than the query's dtype make the call run in the wider one.
    ``vislm.kernels.factors`` has exact factors of common biases.

    Args:
        query_factor: ``(1 or B, 1 or Hq, Nq, R)``.
        key_factor: ``(1 or B, 1 or Hq, Nk, R)``.

    Source: FlashBias (arXiv 2505.12044); https://github.com/thuml/FlashBias.
    """

    query_factor: Tensor
    key_factor: Tensor


@dataclass(frozen=True, eq=False)
class HeadwiseBias:
    """Some heads with a low-rank bias, the others with a dense one: ranks differ widely between learned heads.

    Args:
        low_rank: factors ``(.., len(low_rank_heads), N, R)``.
        low_rank_heads: the query heads that they belong to.
        dense: ``(1 or B, len(dense_heads), Nq, Nk)``.
        dense_heads: the query heads with a dense bias; together the two name every head once.
    """

    low_rank: LowRankBias
    low_rank_heads: tuple[int, ...]
    dense: Tensor
    dense_heads: tuple[int, ...]


Bias = Tensor | RelativeBias | DecoupledBias | AxialBias | LowRankBias | HeadwiseBias
"""Every form of additive logits that :func:`vislm.attend` takes."""

GridBias = RelativeBias | DecoupledBias | AxialBias
"""The forms that need a grid pattern."""


def tensors_of(bias: Bias | None) -> tuple[Tensor, ...]:
    """Return the tensors of a bias, the ones that may need gradients."""
    match bias:
        case None:
            return ()
        case RelativeBias():
            return (bias.table,)
        case DecoupledBias():
            return bias.tables
        case AxialBias():
            return bias.logits
        case LowRankBias():
            return bias.query_factor, bias.key_factor
        case HeadwiseBias():
            return *tensors_of(bias.low_rank), bias.dense
    return (bias,)
