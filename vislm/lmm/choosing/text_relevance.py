"""How relevant visual tokens are to the text behind them: raters among the text, and the attention that they pay.

Source: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv 2410.04417; github.com/Gumpest/SparseVLMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.choosing.ranking import Place
from vislm.lmm.interventions import LanguageView


def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Return m (T,): the softmax over T text tokens (T, C) of their products with visual tokens (V, C), mean over V."""
    return (visual.float() @ text.float().T).softmax(-1).mean(0)


def choose_raters(scores: Tensor) -> Tensor:
    """Return the indices of text tokens that score above the mean (T,); of all, if they score alike."""
    raters = (scores > scores.mean()).nonzero().squeeze(1)
    return raters if len(raters) else torch.arange(len(scores), device=scores.device)


def image_raters(view: LanguageView, place: Place, columns: Tensor) -> Tensor:
    """Return the columns (R,) of an image's raters among the S alive; none if no text follows the image.

    Raters are chosen once, from the embeddings of the image's tokens and of all text behind its last one, and kept in
    the method's memory as columns of the prompt.

    Args:
        view: the stage's view.
        place: the image.
        columns: its columns alive, ascending.
    """
    row, _ = place
    memory: dict[Place, Tensor] = view.memory.setdefault("raters", {})
    if place not in memory:
        # padding precedes the prompt, so that what follows the image is text or another image
        text = (view.image_of[row] < 0).nonzero().squeeze(1)
        text = text[text > columns[-1]]
        prompt, embeddings = view.columns[row], view.embeddings[row]
        if len(text):
            text = text[choose_raters(rater_scores(embeddings[prompt[columns]], embeddings[prompt[text]]))]
        memory[place] = prompt[text]
    alive = torch.isin(view.columns[row], memory[place]) & (view.image_of[row] < 0)
    return alive.nonzero().squeeze(1)
