"""Looking for retrieval heads with needles: sentences hidden in a prompt, which the model has to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.recorder import Recorder, recorded
from vislm.analysis.retrieval import LEAST_RECALL, find_needle, retrieval_scores, rouge1_recall
from vislm.errors import UsageError
from vislm.lmm.model import LMM, ImageSource
from vislm.lmm.session import attach


@dataclass(frozen=True)
class Trial:
    """One prompt with a needle in it."""

    image: ImageSource | None
    question: str
    """The whole text: haystack with the needle, and the request."""
    needle: str


def needle_scores(
    lmm: LMM,
    trials: Sequence[Trial],
    *,
    max_new_tokens: int = 50,
    repeats: Literal["code_counts_each", "paper_counts_once"] = "code_counts_each",
) -> tuple[Tensor, int]:
    """Return the mean score (L, H) of every head, and how many trials counted: answers that repeat half of the needle.

    Raises:
        UsageError: no trial counted.
    """
    tokenizer = lmm.processor.tokenizer
    found: list[Tensor] = []
    for trial in trials:
        inputs = lmm.prepare([trial.image], [trial.question])
        prompt = inputs["input_ids"][0].tolist()
        with attach(lmm.model, Recorder()) as session, torch.no_grad():
            out = lmm.model.generate(  # pyright: ignore[reportCallIssue]
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
            recording = recorded(session.last_run)
        new = out[0, len(prompt) :].tolist()[: len(recording.steps)]
        if rouge1_recall(tokenizer.decode(new, skip_special_tokens=True), trial.needle) <= LEAST_RECALL:
            continue
        span = find_needle(prompt, tokenizer.encode(trial.needle, add_special_tokens=False))
        top = recording.over_steps("top_key").long().cpu()
        found.append(retrieval_scores(top, new, prompt, span, repeats=repeats))
    if not found:
        raise UsageError(f"none of {len(trials)} answers repeats more than {LEAST_RECALL:.0%} of its needle")
    return torch.stack(found).mean(0), len(found)
