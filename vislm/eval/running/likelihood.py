"""How likely a model finds whole answers: each choice is fed to it word by word, behind the prompt.

The prompt's prefill is that of free answers, so pruning and head methods act exactly as they do there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vislm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def likelihoods(
    lmm: Any, images: Sequence[Any], prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[tuple[list[float], Any]]:
    """Return for each prompt the log-probability of each of its choices (the sum over the choice's tokens, natural
    logarithm, end of text not included) and the model's answer object of one of them.

    Args:
        lmm: a ``vislm.LMM``.
        images: one entry per prompt, as ``LMM.ask_many`` takes them.
        prompts: plain text.
        choices: one or more texts per prompt.

    Raises:
        UsageError: a prompt without choices, or a choice without words.
    """
    pairs = [(number, choice) for number, texts in enumerate(choices) for choice in texts]
    if {number for number, _ in pairs} != set(range(len(prompts))):
        raise UsageError(f"{len(prompts)} prompts, some without choices; give every prompt one or more")
    values: list[list[float]] = [[] for _ in prompts]
    answers: list[Any] = [None] * len(prompts)
    for start in range(0, len(pairs), len(prompts)):
        part = pairs[start : start + len(prompts)]
        forced = Forced([_tokens(lmm, choice) for _, choice in part], lmm.processor.tokenizer.eos_token_id)
        found = lmm.ask_many(
            [images[number] for number, _ in part],
            [prompts[number] for number, _ in part],
            max_new_tokens=forced.steps,
            logits_processor=[forced],
        )
        for (number, _), value, answer in zip(part, forced.log_probabilities(), found, strict=True):
            values[number].append(value)
            answers[number] = answer
    return list(zip(values, answers, strict=True))


class Forced:
    """A logits processor that lets each sequence say its given tokens only, and notes how likely they were."""

    def __init__(self, tokens: Sequence[Sequence[int]], end: int) -> None:
        self._tokens, self._end = tokens, end
        self.steps = max(map(len, tokens))
        self._noted: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the log-probabilities of the next tokens and leave only them. input_ids (B, N), scores (B, V)."""
        import torch

        step = len(self._noted)
        wanted = torch.tensor([t[step] if step < len(t) else self._end for t in self._tokens], device=scores.device)
        rows = torch.arange(len(wanted), device=scores.device)
        self._noted.append(scores.float().log_softmax(-1)[rows, wanted])
        only = torch.full_like(scores, float("-inf"))
        only[rows, wanted] = 0.0
        return only

    def log_probabilities(self) -> list[float]:
        """Return the sum over each sequence's own tokens."""
        return [sum(float(self._noted[step][i]) for step in range(len(t))) for i, t in enumerate(self._tokens)]


def _tokens(lmm: Any, choice: str) -> list[int]:
    tokens = lmm.processor.tokenizer.encode(choice, add_special_tokens=False)
    if not tokens:
        raise UsageError(f"choice {choice!r} has no words for the model's tokenizer")
    return tokens
