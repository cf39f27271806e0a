"""VAF (ClearSight): scale the attention logits on the image up and on the text before it down, in the middle layers.

Source: Yin et al., "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large
Language Models", CVPR 2025; github.com/ustc-hyin/ClearSight. As coded, a factor above 1 lowers a negative logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.decoder.logit_scaling import scale_groups
from vislm.lmm.interventions import EditStage, EditView


@dataclass(frozen=True)
class VAF:
    """Scale the logits of all rows behind the image, in every head of the layers."""

    enh_para: float = 1.15
    """Factor of the logits on image keys."""
    sup_para: float = 0.95
    """Factor of the logits on keys before the image (the system prompt)."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: 9-14 of every 32."""
    name = "vaf"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none when both factors are 1."""
        for option in ("enh_para", "sup_para"):
            if not 0.0 <= getattr(self, option) < math.inf:
                raise UsageError(f"{option}={getattr(self, option)}: expected a finite factor >= 0 (1 changes nothing)")
        layers = chosen_layers(self.layers, len(adapter.layers), 9, 15)
        if (self.enh_para == 1.0 and self.sup_para == 1.0) or not layers:
            return []
        return [EditStage(layers, self.edit, "after_image")]

    def edit(self, view: EditView) -> Tensor:
        """Return the rows' weights (B, H, R, K) from the scaled logits."""
        return view.softmax(scale_groups(view.logits, view.keys, self.enh_para, self.sup_para))


METHOD = VAF
