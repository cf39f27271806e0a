"""CDPruner: a determinantal point process picks tokens that are diverse and relevant to the question.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
NeurIPS 2025, arXiv 2506.10967; github.com/Theia-4869/CDPruner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.clip_text import load_clip
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import ImageView, Positions, PromptStage


def relevance(patches: Tensor, text: Tensor) -> Tensor:
    """Return r (..., n) = - mean over segments of cos(patch, text), in float32.

    The minus sign is the official code's: patches that are less similar to the text weigh more.

    Args:
        patches: (..., n, E) image embeddings of the patches.
        text: (M, E) text embeddings of the question's segments.
    """
    similarity = functional.normalize(patches.float(), dim=-1) @ functional.normalize(text.float(), dim=-1).T
    return -similarity.mean(-1)


def to_unit_range(r: Tensor, shared: bool = False) -> Tensor:
    """Return (r - min + 1e-6) / (max - min) of r (B, n), per row or, ``shared``, over the batch; 1 if all are equal."""
    low, high = (r.min(), r.max()) if shared else (r.amin(-1, keepdim=True), r.amax(-1, keepdim=True))
    return torch.where(high > low, (r - low + 1e-6) / (high - low), 1.0)


def conditional_kernel(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return L_ij = w_i cos(token_i, token_j) w_j (n, n) of tokens (n, C) and weights (n,), in float32."""
    unit = functional.normalize(tokens.float(), dim=-1)
    return weight[:, None] * (unit @ unit.T) * weight[None]


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the greedy most probable subset of a DPP with kernel (n, n), in order of choice.

    Incremental Cholesky factors: each step adds the item that enlarges the determinant most. Meaningful while
    ``count`` is below the kernel's rank.
    """
    gain = kernel.diagonal().clone()
    factors = kernel.new_zeros(count, kernel.shape[0])
    chosen = []
    for step in range(count):
        j = int(gain.argmax())
        chosen.append(j)
        row = (kernel[j] - factors[:step, j] @ factors[:step]) / gain[j].sqrt()
        factors[step] = row
        gain = gain - row.square()
        gain[j] = -torch.inf
    return torch.tensor(chosen, device=kernel.device)


@dataclass(frozen=True)
class CDPruner:
    """Keep the most probable subset of every crop's tokens before the language model; separators are dropped.

    ``relevance`` says where the relevance to the question comes from. "clip": the cosine of patch and question in the
    joint space of the CLIP model named by ``clip``, whose tower the LMM must have (the paper). "embedding": the cosine
    of projected tokens and the prompt's text embeddings, for LMMs without such a text encoder; ours, not the paper's.
    "none": diversity alone.
    """

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them."""
    relevance: Literal["clip", "embedding", "none"] = "clip"
    clip: str | None = None
    """Folder or hub name of the CLIP model, e.g. openai/clip-vit-large-patch14-336."""
    shared_range: bool = False
    """Bring relevance to [0, 1] over all crops together, as the official code does over the batch."""
    positions: Positions = "contiguous"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "cdpruner"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model.

        Raises:
            UsageError: relevance from CLIP without a CLIP model.
            PlanConflict: relevance from CLIP, but the tower's patches have no features of their own.
        """
        check_keep(self.keep)
        if self.relevance == "clip":
            if self.clip is None:
                raise UsageError(
                    "cdpruner compares patches with the question by CLIP's text encoder, which the LMM does not hold: "
                    "give clip=<folder or hub name> of its tower's CLIP model, or relevance=embedding or none"
                )
            if not adapter.has_token_features:
                raise PlanConflict(
                    f"cdpruner: the {adapter.family} tower is no CLIP tower with features per token; use "
                    "relevance=embedding or relevance=none"
                )
        return [
            PromptStage(
                lambda view: self._select(view, adapter),
                self.positions,
                needs_tower=self.relevance == "clip",
                expected=lambda alive: alive.after(self.keep),
            )
        ]

    def _select(self, view: ImageView, adapter: Adapter) -> Tensor:
        candidates = view.candidates.nonzero().flatten()
        count = token_count(self.keep, len(candidates))
        if count == len(candidates):
            return view.candidates
        tokens = view.features[candidates]
        r = self._relevance(view, adapter)
        weight = torch.ones(len(candidates), device=tokens.device)
        if r is not None:
            weight = to_unit_range(r[candidates].unsqueeze(0))[0]
        keep = torch.zeros_like(view.candidates)
        keep[candidates[greedy_map(conditional_kernel(tokens, weight), count)]] = True
        return keep

    def _relevance(self, view: ImageView, adapter: Adapter) -> Tensor | None:
        """Return r (n,) of every token of the image; separators have 0."""
        if self.relevance == "none":
            return None
        if self.relevance == "embedding":
            assert view.text_ids is not None
            return -relevance(view.features, adapter.embed(view.text_ids))
        assert self.clip is not None
        assert view.tower is not None
        assert view.tower.features is not None
        assert view.pack is not None
        if view.question is None:
            raise UsageError(
                "cdpruner needs the question in plain text: use lmm.ask, or set session.questions = [...] of the "
                "session that attach() gives"
            )
        space = load_clip(self.clip)
        patches = space.patches(view.tower.features[:, adapter.tower_prefix :])
        r = relevance(patches, space.text(view.question))
        return view.pack(r.unsqueeze(-1), 0.0).squeeze(-1)


METHOD = CDPruner
