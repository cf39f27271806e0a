"""AIR: scale and lift the logits on the image, silence hallucination heads, flatten what is left.

Source: Sun et al., CVPR 2026, arXiv 2603.24058; github.com/Ice-wave/AIR. In the order of the code: VAF's scaling in the
middle layers; in the last row a lift of the image's logits; the softmax; AD-HH; the variance-constrained projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import Heads, head_list
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.decoder.attention_sums import MatrixSums, logit_squares
from vislm.lmm.decoder.edits import pieces, row_logits
from vislm.lmm.decoder.grouped_heads import head_mask
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.decoder.logit_scaling import scale_groups, silence_text
from vislm.lmm.interventions import EditStage, EditView, PrepareView


def lift_image(logits: Tensor, image: Tensor, strength: float) -> Tensor:
    """Return logits (B, H, R, K) plus ``strength`` times the mean over heads of |S| on image keys (B, K) bool."""
    mean = logits.abs().mean(1, keepdim=True)
    return torch.addcmul(logits, image[:, None, None].to(logits.dtype), mean, value=strength)


def rescale_gain(squares: Tensor) -> Tensor:
    """Return factors (B, H, ...) that bring heads' logit matrices towards one norm, from ||S_h||_F^2 (B, H, ...)."""
    return (squares.mean(1, keepdim=True) / (squares + 1e-8)).sqrt().clamp(0.8, 1.25)


def remove_trace(sums: MatrixSums, scale: float = 1.0, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, H) each: what to subtract on the diagonal, the factor back to the old Frobenius norm, the new mean.

    For square attention matrices T x T: A' = f (A - trace(A) / T I) with ||A'|| = ``scale`` ||A||.
    """
    size = sums.size[:, None]
    rest = (sums.squares - sums.trace.square() / size).clamp(min=0.0).sqrt()
    factor = scale * sums.squares.sqrt() / (rest + eps)
    return sums.trace / size, factor, factor * (sums.total - sums.trace) / size.square()


def project(attention: Tensor, beta: float = 0.1, scale: float = 1.0, eps: float = 1e-8) -> Tensor:
    """Return the variance-constrained projection of whole matrices (B, H, Q, K), as coded.

    A square one loses its trace and is brought back to its norm; then every entry, masked ones included, moves by
    ``beta`` towards the matrix's mean.
    """
    mean = attention.mean((-2, -1), keepdim=True)
    if attention.shape[-1] == attention.shape[-2]:
        diagonal, factor, centre = (x[..., None, None] for x in remove_trace(MatrixSums.of(attention), scale, eps))
        eye = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
        attention, mean = factor * (attention - diagonal * eye), centre
    return (1.0 - beta) * attention + beta * mean


@dataclass(frozen=True)
class AIR:
    """Edit rows behind the image (scaling) and the last row (the rest), in ranges of layers."""

    heads: str | Heads | None = None
    """Hallucination heads for AD-HH: an artefact of kind "heads", or (layer, head) pairs; required, may be empty."""
    enhance: float = 1.08
    """Factor of the logits on image keys, in ``scaled_layers``."""
    suppress: float = 0.97
    """Factor of the logits on keys before the image, in ``scaled_layers``."""
    lift: float = 0.28
    """Strength of the lift of the image's logits, in ``layers``."""
    threshold: float = 0.4
    """Share of attention on text from which a hallucination head is silenced."""
    beta: float = 0.1
    """How far the projection moves weights towards their mean, in ``layers``; at the decode steps."""
    layers: tuple[int, ...] | None = None
    """Of lift and projection, 0-based; None: 5-17 of every 32."""
    scaled_layers: tuple[int, ...] | None = None
    """Of the scaling, 0-based; None: 9-14 of every 32."""
    project_prefill: bool = False
    """Project the prefill's matrices too, as released: rows then no longer sum to 1 and attend to later tokens."""
    rescale_logits: bool = False
    """First bring the heads' logit matrices in ``layers`` towards one norm; off in the release."""
    name = "air"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage for each way in which layers are edited; none if every part is neutral."""
        self._check()
        depth = len(adapter.layers)
        heads = head_list(self.heads or (), adapter, ("air", "ad_hh")) if self.threshold <= 1.0 else {}
        whole = self.project_prefill or self.rescale_logits
        middle = chosen_layers(self.layers, depth, 5, 18) if whole or self.lift or self.beta else frozenset()
        scaled = chosen_layers(self.scaled_layers, depth, 9, 15)
        if self.enhance == self.suppress == 1.0:
            scaled = frozenset()
        edits = _Edits(self, middle, scaled, heads)
        listed = frozenset(heads) - middle - scaled
        if whole:
            stages = [
                EditStage(middle, edits.edit, "all", prepare=edits.prepare),
                EditStage(scaled - middle, edits.edit, "after_image"),
            ]
        else:
            stages = [EditStage(middle - scaled, edits.edit), EditStage(scaled, edits.edit, "after_image")]
        stages.append(EditStage(listed, edits.silence, heads=lambda layer: heads[layer]))
        return [stage for stage in stages if stage.layers]

    def _check(self) -> None:
        if self.heads is None:
            raise UsageError(
                "air needs heads=, found for this model: a file of vislm calibrate-heads --what ad_hh, pairs such as "
                "16/29+26/9, or an empty list"
            )
        for option in ("enhance", "suppress", "lift", "threshold"):
            if not 0.0 <= getattr(self, option) < math.inf:
                raise UsageError(f"{option}={getattr(self, option)}: expected a finite number >= 0")
        if not 0.0 <= self.beta <= 1.0:
            raise UsageError(f"beta={self.beta}: expected a share in [0, 1]")


@dataclass(frozen=True)
class _Edits:
    """The edits of one model: which layers take part in what."""

    options: AIR
    middle: frozenset[int]
    scaled: frozenset[int]
    heads: dict[int, tuple[int, ...]]

    def silence(self, view: EditView) -> Tensor:
        return silence_text(view.softmax(), view.keys, self.options.threshold)

    def prepare(self, view: PrepareView) -> None:
        """Sum up the matrices that a whole prefill's projection needs, a few rows at a time."""
        queries = view.call.query.shape[2]
        rows = torch.arange(queries, device=view.call.query.device)
        valid = view.keys.valid[:, :queries]
        if self.options.rescale_logits:
            gain = rescale_gain(logit_squares(view.call, valid))
            view.memory.setdefault("gain", {})[view.layer] = gain
        if not self.options.project_prefill:
            return
        sums = MatrixSums.zero(view.call.query.shape[:2], valid.sum(-1))
        for piece in pieces(view.call, rows):
            logits, allowed = row_logits(view.call, piece), view.call.allowed(piece)
            weights = self._attend(view.layer, logits, allowed, view.keys, piece, view.memory)
            sums.add(torch.where(valid[:, None, piece, None], weights, 0.0), piece)
        view.memory.setdefault("sums", {})[view.layer] = sums

    def edit(self, view: EditView) -> Tensor:
        options, rows = self.options, view.rows if view.phase == "prefill" else None
        allowed = None if view.sees_all else view.allowed
        weights = self._attend(view.layer, view.logits, allowed, view.keys, rows, view.memory)
        if view.layer not in self.middle:
            return weights
        if rows is None:
            if allowed is None:
                return weights.lerp(weights.mean(-1, keepdim=True), options.beta)
            mean = weights.sum(-1, keepdim=True) / view.allowed.sum(-1, keepdim=True)
            return weights.lerp(torch.where(view.allowed, mean, 0.0), options.beta)
        if not options.project_prefill:
            return weights
        columns = torch.arange(weights.shape[-1], device=weights.device)
        diagonal, factor, mean = (x[..., None, None] for x in remove_trace(view.memory["sums"][view.layer]))
        weights = factor * (weights - diagonal * (columns == rows[:, None]))
        prompt = (view.keys.valid & (columns < view.keys.prompt))[:, None, None]
        return (1.0 - options.beta) * weights + options.beta * torch.where(prompt, mean, 0.0)

    def _attend(
        self, layer: int, logits: Tensor, allowed: Tensor | None, keys: KeyGroups, rows: Tensor | None, memory: dict
    ) -> Tensor:
        """Return weights (B, H, R, K) before the projection.

        ``rows`` (R,) of the prefill, None: a decode step; ``allowed`` None: every key.
        """
        options = self.options
        last = None if rows is None else (rows == keys.prompt - 1)[:, None]
        if options.rescale_logits and layer in self.middle:
            seen = (logits if allowed is None else torch.where(allowed, logits, 0.0)).square().sum(-1, keepdim=True)
            logits = logits * (rescale_gain(seen) if rows is None else memory["gain"][layer][..., None, None])
        if layer in self.scaled:
            behind = None if rows is None else keys.after[:, None, rows, None]
            logits = _where(behind, scale_groups(logits, keys, options.enhance, options.suppress), logits)
        if layer in self.middle and options.lift:
            logits = _where(last, lift_image(logits, keys.image, options.lift), logits)
        weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
        if layer in self.heads:
            listed = head_mask(self.heads[layer], weights.shape[1], weights.device)
            weights = silence_text(weights, keys, options.threshold, listed if last is None else listed & last)
        return weights


def _where(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if mask is None else torch.where(mask, new, old)


METHOD = AIR
