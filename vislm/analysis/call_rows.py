"""The rows of one attention call of a running model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vislm.lmm.decoder.attention import AttentionCall


@dataclass(frozen=True)
class CallRows:
    """A call as a source of rows (see ``vislm.analysis.rows``); the empty tail of a static cache is cut off."""

    call: AttentionCall

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        batch, heads, queries, _ = self.call.query.shape
        return batch, heads, queries, min(self.call.key.shape[2], queries)

    def rows(self, index: Tensor) -> Tensor:
        """Return the softmaxed rows (B, H, R, K), float32."""
        return self.call.rows(index)[..., : self.shape[3]]
