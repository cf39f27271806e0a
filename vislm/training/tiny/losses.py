"""Stage A: aligning every patch with the word for what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlavaForConditionalGeneration

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import COLOURS, Scene
from vislm.training.tiny.vocabulary import IDS, UNKNOWN

CATEGORY_WORDS = [UNKNOWN, *(IDS[name] for name in CATEGORIES)]
COLOUR_WORDS = [IDS[name] for name in COLOURS]
BACKGROUND_WEIGHT = 0.3


class PresenceHeads(nn.Module):
    """Two linear read-outs of the categories from CLS, which give CLS attention something to look for."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled, self.penultimate = nn.Linear(128, len(CATEGORIES)), nn.Linear(128, len(CATEGORIES))


class DenseLabels(NamedTuple):
    """Targets of B scenes with 64 patches."""

    category: Tensor
    """(B, 64): 0 background, else 1 + category."""
    colour: Tensor
    """(B, 64): colour, -100 on background."""
    present: Tensor
    """(B, 16) float."""


def dense_labels(scenes: Sequence[Scene]) -> DenseLabels:
    """Label each patch with the object whose distance, in its radii (at least 6.2 px), is smallest and at most 1."""
    side = torch.arange(8) * 8.0 + 4.0
    y, x = (g.flatten() for g in torch.meshgrid(side, side, indexing="ij"))
    category = torch.zeros(len(scenes), 64, dtype=torch.int64)
    colour = torch.full((len(scenes), 64), -100)
    present = torch.zeros(len(scenes), len(CATEGORIES))
    names = list(COLOURS)
    for row, scene in enumerate(scenes):
        items = scene.instances
        at = torch.tensor([[i.x, i.y, max(6.2, i.r)] for i in items])
        distance = ((x - at[:, :1]) ** 2 + (y - at[:, 1:2]) ** 2).sqrt() / at[:, 2:]
        nearest, which = distance.min(0)
        kinds = torch.tensor([1 + CATEGORIES.index(i.category) for i in items])
        shades = torch.tensor([names.index(i.colour) for i in items])
        hit = nearest <= 1.0
        category[row][hit] = kinds[which[hit]]
        colour[row][hit] = shades[which[hit]]
        present[row, kinds - 1] = 1.0
    return DenseLabels(category, colour, present)


def alignment_loss(
    model: LlavaForConditionalGeneration, heads: PresenceHeads, pixels: Tensor, labels: DenseLabels
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of stage A and what to log: logits of a patch are 12 times its product with the words."""
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    penultimate = tower.hidden_states[-2]
    patches = model.model.multi_modal_projector(penultimate[:, 1:])
    logits = 12.0 * patches @ model.model.language_model.embed_tokens.weight.T
    categories, colours = logits[..., CATEGORY_WORDS], logits[..., COLOUR_WORDS]
    weight = torch.ones(len(CATEGORY_WORDS))
    weight[0] = BACKGROUND_WEIGHT
    loss = cross_entropy(categories.flatten(0, 1), labels.category.flatten(), weight)
    loss = loss + 0.5 * cross_entropy(colours.flatten(0, 1), labels.colour.flatten())
    number = torch.arange(64)
    for first, second, side in (("top", "bottom", number // 8 >= 4), ("left", "right", number % 8 >= 4)):
        pair = logits[..., [IDS[first], IDS[second]]]
        loss = loss + 0.1 * cross_entropy(pair.flatten(0, 1), side.long().repeat(len(pixels)))
    loss = loss + 0.3 * (patches.norm(dim=-1) - 1.5).relu().square().mean()
    pooled = heads.pooled(tower.pooler_output)
    inner = heads.penultimate(penultimate[:, 0])
    for prediction in (pooled, inner):
        loss = loss + 0.5 * binary_cross_entropy_with_logits(prediction, labels.present)
    with torch.no_grad():
        shown = labels.category > 0
        log = {
            "category": (categories.argmax(-1) == labels.category)[shown].float().mean().item(),
            "colour": (colours.argmax(-1) == labels.colour)[shown].float().mean().item(),
            "present": ((inner > 0) == (labels.present > 0)).float().mean().item(),
        }
    return loss, log
