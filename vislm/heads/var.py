"""VAR: move attention from sink tokens to the other image tokens, in the heads that look at the image.

Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
2503.03321; github.com/seilk/VisAttnSink. Where paper and code differ, the option's values say which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import sink_dims
from vislm.lmm.interventions import EditStage, EditView, PrepareView

FIRST_LAYER = 2
"""Sinks form behind the first two layers, at any depth."""
LLAMA2_DIMS = {4096: (1415, 2533), 5120: (2100, 4743)}
"""Hidden size of LLaMA-2 and its descendants (Vicuna, LLaVA-1.5) -> D_sink."""
_LLAMA2_WORDS = 33_000
_SMALL = 1e-6


def sink_activation(hidden: Tensor, dims: Sequence[int]) -> Tensor:
    """Return phi (..., T): the largest |x_j| / RMS(x) over the dimensions j, of hidden states (..., T, D), float32."""
    x = hidden[..., list(dims)].float().abs().amax(-1)
    return x * (hidden.float().square().mean(-1) + _SMALL).rsqrt()


def sink_tokens(hidden: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Return (..., T) bool: tokens of hidden states (..., T, D) whose activation exceeds ``tau``."""
    return sink_activation(hidden, dims) > tau


def sink_groups(image: Tensor, sinks: Tensor) -> Tensor:
    """Return (B, 4, n) float32 masks of n keys: image tokens, those that are sinks, those that are none, all sinks.

    Args:
        image: (B, n) bool.
        sinks: (B, n) bool.
    """
    return torch.stack([image, image & sinks, image & ~sinks, sinks], 1).float()


def group_masses(weights: Tensor, groups: Tensor) -> Tensor:
    """Return (B, H, R, 4): what rows of weights (B, H, R, K) give each group (B, 4, n) of the first n keys."""
    return weights[..., : groups.shape[-1]] @ groups.mT[:, None]


def image_centric(masses: Tensor, groups: Tensor, rho: float, summ: float) -> Tensor:
    """Return (B, H, R) bool: rows with at least ``summ`` on the image and at most the share ``rho`` of it on its sinks.

    In samples without image sinks it is False everywhere.

    Args:
        masses: (B, H, R, 4) of :func:`group_masses`.
        groups: (B, 4, n) of :func:`sink_groups`.
        rho: largest share P of the image's attention that its sinks may have.
        summ: least attention I on the image.
    """
    tokens = groups[:, :2].sum(-1)[..., None, None]
    share = masses[..., 1] / (masses[..., 0] + _SMALL * tokens[:, 0])
    return (share <= rho) & (masses[..., 0] >= summ) & (tokens[:, 1] > 0)


def redistribute(weights: Tensor, masses: Tensor, groups: Tensor, rows: Tensor, kept: float) -> Tensor:
    """Return weights (B, H, R, K) in which sinks keep the fraction ``kept`` and other image tokens share the rest.

    They share in proportion to their own weights, so that row sums stay. Rows outside ``rows`` (B, H, R), and those
    without attention on any such token, are left alone. Masses and groups as in :func:`image_centric`.
    """
    rows = rows & (masses[..., 2] > 0.0)
    gain = (1.0 - kept) * masses[..., 3] / masses[..., 2].clamp(min=torch.finfo(torch.float32).tiny)
    change = torch.stack([torch.where(rows, gain, 0.0), torch.where(rows, kept - 1.0, 0.0)], -1)
    known = groups.shape[-1]
    prompt = weights[..., :known] * (1.0 + change @ groups[:, None, 2:])
    return prompt if known == weights.shape[-1] else torch.cat([prompt, weights[..., known:]], -1)


@dataclass(frozen=True)
class VAR:
    """Edit all rows behind the image at the prefill, and every row later; sinks are those of the prefill."""

    p: float = 0.6
    rho: float = 0.5
    summ: float = 0.2
    """Least attention that a head gives the image, to be one of those that look at it."""
    tau: float = 20.0
    dims: str | tuple[int, ...] | None = None
    """D_sink: an artefact of kind "sink_dims", or the dimensions, such as 1415+2533; None: those of LLaMA-2."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: from the third on."""
    except_last_layer: bool = True
    """As in the paper; the released code edits the last layer too, although its option says otherwise."""
    p_reading: Literal["code_keeps", "paper_moves"] = "code_keeps"
    """What the fraction ``p`` of the attention on sinks does: it stays there, or it goes to other image tokens."""
    rho_reading: Literal["code_sink_ratio", "paper_other_ratio"] = "code_sink_ratio"
    """What ``rho`` bounds: the sinks' share of the image's attention from above, or that of the others from below."""
    name = "var"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none when sinks keep everything, or when no layer is left."""
        for name, value in (("p", self.p), ("rho", self.rho), ("summ", self.summ)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name}={value}: expected a share between 0 and 1")
        if self._kept == 1.0:
            return []
        width, depth = adapter.text_config.hidden_size, len(adapter.layers)
        if not 0.0 < self.tau < width**0.5:
            raise UsageError(
                f"tau={self.tau}: expected a number > 0 and, as a normalised activation never exceeds sqrt({width}), "
                f"less than {width**0.5:.3g}; vislm calibrate-heads --what sinks shows the model's activations"
            )
        dims = sink_dims(self._known_dims(adapter) if self.dims is None else self.dims, adapter, ("var",))
        layers = range(FIRST_LAYER, depth) if self.layers is None else self.layers
        chosen = frozenset(layers) - ({depth - 1} if self.except_last_layer else set())
        if not chosen or not dims:
            return []

        def prepare(view: PrepareView) -> None:
            assert view.hidden is not None
            sinks = sink_tokens(view.hidden, dims, self.tau)
            known = sinks.shape[1]
            sinks &= view.keys.valid[:, :known]
            view.memory.setdefault("sinks", {})[view.layer] = sinks
            view.memory.setdefault("groups", {})[view.layer] = sink_groups(view.keys.image[:, :known], sinks)

        return [EditStage(chosen, self.edit, "after_image", prepare=prepare, needs_hidden=True)]

    def edit(self, view: EditView) -> Tensor | None:
        """Return the rows' weights (B, H, R, K), or None where no head passes the test."""
        groups: Tensor = view.memory["groups"][view.layer]
        weights = view.softmax()
        if len(groups) != len(weights):  # beams that came after the prefill
            groups = groups.repeat_interleave(len(weights) // len(groups), 0)
        masses = group_masses(weights, groups)
        rho = self.rho if self.rho_reading == "code_sink_ratio" else 1.0 - self.rho
        rows = image_centric(masses, groups, rho, self.summ)
        return redistribute(weights, masses, groups, rows, self._kept) if bool(rows.any()) else None

    @property
    def _kept(self) -> float:
        return self.p if self.p_reading == "code_keeps" else 1.0 - self.p

    def _known_dims(self, adapter: Adapter) -> tuple[int, ...]:
        config = adapter.text_config
        is_llama2 = config.model_type == "llama" and config.vocab_size < _LLAMA2_WORDS
        if not is_llama2 or config.hidden_size not in LLAMA2_DIMS:
            raise UsageError(
                "var: the sink dimensions of this model are not published; find them with vislm calibrate-heads "
                "--what sinks and give that file as dims="
            )
        return LLAMA2_DIMS[config.hidden_size]


METHOD = VAR
