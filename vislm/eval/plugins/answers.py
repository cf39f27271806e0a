"""Answers of an LMM in the order of the questions: free ones in batches, and the likelihood of given ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vislm.errors import ImageError, UsageError
from vislm.eval.plugins.requests import Generation, Question, in_batches
from vislm.eval.running.likelihood import Forced

if TYPE_CHECKING:
    from torch import Tensor


class Answerer:
    """Answers questions with a ``vislm.LMM``; broken pictures are counted and answered by nothing."""

    def __init__(self, lmm: Any, batch_size: int) -> None:
        self.lmm, self.batch_size = lmm, batch_size
        self.faults: Counter[str] = Counter()
        """Message -> how often."""

    def generate(self, questions: Sequence[Question], how: Sequence[Generation]) -> list[str]:
        """Return one text per question."""
        found = [""] * len(questions)
        for batch in in_batches([h.key for h in how], [q.text for q in questions], self.batch_size):
            first = how[batch[0]]
            texts = self._texts([questions[n] for n in batch], first)
            for n, text in zip(batch, texts, strict=True):
                found[n] = how[n].cut(text)
        return found

    def _texts(self, questions: Sequence[Question], how: Generation) -> list[str]:
        try:
            answers = self.lmm.ask_many(
                [q.images or None for q in questions],
                [q.text for q in questions],
                max_new_tokens=how.max_new_tokens,
                **how.options,
            )
        except ImageError as error:
            if len(questions) > 1:  # the others are fine
                return [text for q in questions for text in self._texts([q], how)]
            self.faults[str(error)] += 1
            return [""]
        return [answer.text for answer in answers]

    def loss(self, asked: Question, continuation: str) -> tuple[float, bool]:
        """Return the mean negative log-probability of a continuation's tokens, and whether each was the likeliest.

        Raises:
            UsageError: a continuation without words.
        """
        tokenizer = self.lmm.processor.tokenizer
        tokens = tokenizer.encode(continuation.strip(), add_special_tokens=False)
        if not tokens:
            raise UsageError(f"the continuation {continuation!r} has no words for the model's tokenizer")
        forced = Watched([tokens], tokenizer.eos_token_id)
        self.lmm.ask_many([asked.images or None], [asked.text], max_new_tokens=forced.steps, logits_processor=[forced])
        (total,) = forced.log_probabilities()
        return -total / len(tokens), forced.greedy


class Watched(Forced):
    """Also notes whether the forced tokens are the likeliest ones; for a single sequence."""

    greedy = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note, and leave only the next token. input_ids (1, N), scores (1, V)."""
        only = super().__call__(input_ids, scores)
        self.greedy = self.greedy and bool(only.argmax(-1) == scores.argmax(-1))
        return only
