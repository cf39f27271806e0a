"""How well a model answers calibration questions; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.calibration.samples import Sample
from vislm.errors import UsageError
from vislm.lmm.interventions import Intervention
from vislm.lmm.model import LMM

Score = Literal["accuracy", "likelihood", "entropy"]
"""accuracy: the right answer's first token has the largest logit among those of all answers; likelihood: its log
probability among them, finer where samples are few (ours); entropy: minus that of the next token, without answers."""


@dataclass(frozen=True)
class Scorer:
    """Asks the questions."""

    lmm: LMM
    samples: Sequence[Sample]
    score: Score = "accuracy"

    def __post_init__(self) -> None:
        if self.score == "entropy":
            return
        if any(sample.answer is None for sample in self.samples):
            raise UsageError(
                "some samples have no answer; list them in samples.jsonl, or use --score entropy, which needs none"
            )
        if len(self.answers) < 2:
            raise UsageError(f"all samples have the same answer {self.answers}; a score needs at least two")

    @property
    def answers(self) -> list[str]:
        """All answers that occur."""
        return sorted({sample.answer for sample in self.samples if sample.answer is not None})

    def __call__(self, method: Intervention, copies: int) -> list[float]:
        """Return the mean score over the samples of each of ``copies`` rows that repeat the prompt, under a method."""
        with self.lmm.using(method):
            values = [self._one(sample, copies) for sample in self.samples]
        return torch.stack(values).double().mean(0).tolist()

    def _one(self, sample: Sample, copies: int) -> Tensor:
        """Return (copies,) scores of one sample."""
        images, questions = [sample.image] * copies, [sample.question] * copies
        if self.score == "entropy":
            with torch.no_grad():
                logits = self.lmm.model(**self.lmm.prepare(images, questions), logits_to_keep=1).logits[:, -1]
            return -torch.distributions.Categorical(logits=logits.float()).entropy().cpu()
        assert sample.answer is not None
        answers, right = self.answers, self.answers.index(sample.answer)
        replies = self.lmm.ask_many(images, questions, max_new_tokens=1, candidates=answers)
        logits = torch.tensor([[reply.candidates[word] for word in answers] for reply in replies])
        if self.score == "accuracy":
            return (logits.argmax(-1) == right).float()
        return logits.log_softmax(-1)[:, right]
