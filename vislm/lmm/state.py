"""What the parts of a session share while a model runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.prompt.visuals import Encoding
from vislm.lmm.run import Run


@dataclass
class PromptMap:
    """The prompt that the language model really sees. S columns of the caller's prompt, n of them left."""

    length: int
    """S."""
    index: Tensor
    """(B, n) columns that stayed."""
    valid: Tensor | None
    """(B, n) bool, False on padding that was added because rows lost different numbers; None if none was."""
    image_of: Tensor
    """(B, n) number of the image a column belongs to, -1 on text and padding."""
    has_image: Tensor
    """(B,) bool."""
    token_of: Tensor
    """(B, n) place of a visual column in its image's full token sequence, -1 on text and padding."""
    visual: Tensor
    """(B,) visual columns of the full prompt."""
    size: Tensor | None = None
    """(B, n) float32: original tokens that a column stands for; None: one each."""
    shift: Tensor | None = None
    """(B, 1) or (4, B, 1): how much smaller position ids are than the caller counts, with contiguous positions."""
    next_position: Tensor | None = None
    """(B, 1) or (4, B, 1) of the token behind the caller's full prompt; None where it is not needed."""
    untouched: bool = True
    """Whether the model sees the caller's columns as they are."""

    @property
    def removed(self) -> int:
        """Columns by which every row became shorter."""
        return self.length - self.index.shape[1]

    def following(self, cached: int, new: int) -> Tensor:
        """Return the caller's positions (..., B, new) of columns that follow ``cached`` ones of the short prompt."""
        assert self.next_position is not None
        done = cached + self.removed - self.length
        return self.next_position + torch.arange(done, done + new, device=self.index.device)


@dataclass
class SessionState:
    """Where a session stands: the phase of the forward in progress, its prompt, and the record that it fills."""

    adapter: Adapter
    names: tuple[str, ...] = ()
    """Of the interventions, by owner."""
    phase: Literal["prefill", "decode"] | None = None
    """None outside the model's forward."""
    prompt: PromptMap | None = None
    prompt_mask: Tensor | None = None
    """(B, n) the caller's mask of the prompt's columns; None without padding."""
    encoding: str | None = None
    """Modality that the model encodes right now."""
    encodings: dict[str, Encoding] = field(default_factory=dict)
    """Modality -> the call that encoded the images of the prompt to come."""
    positions: Tensor | None = None
    """Position ids of the forward in progress, (B, n) or with rows in front; None: the model counts."""
    questions: list[str] | None = None
    """The samples' questions in plain text, where the caller has said."""
    pending: Run | None = None
    """Encoded images whose prompt has not come yet."""
    last_run: Run | None = None

    @property
    def run(self) -> Run:
        """The run in progress."""
        run = self.pending or self.last_run
        if run is None:
            run = self.pending = Run()
        return run

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Add the time of the context to the run's "scoring", which is known on the CPU only (see ``Run.seconds``)."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.adapter.model.device.type == "cpu":
                self.run.seconds["scoring"] += time.perf_counter() - started

    def clear(self) -> None:
        """Forget everything but the last run's record."""
        self.phase, self.prompt, self.prompt_mask, self.pending = None, None, None, None
        self.encoding, self.positions = None, None
        self.encodings.clear()


def first_layer_keys(cache: Any) -> int:
    """Return how many keys decoder layer 0 holds now."""
    return cache.layers[0].keys.shape[-2]


def valid_columns(mask: Tensor | Mapping[str, Tensor | None] | None, columns: int) -> Tensor | None:
    """Return which prompt columns are no padding, from the mask of a prefill; None if there is none.

    For a static cache ``generate`` makes 4-D masks, one for all layers or one for each type of layer.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None or mask.dim() == 2:
        return mask
    last = mask[:, 0, -1, :columns]  # made for a static cache; the last row sees all valid columns
    return last if last.dtype == torch.bool else last >= 0
