"""The class that lmms-eval runs. Importing this module needs lmms-eval."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from vislm.eval.plugins.answers import Answerer
from vislm.eval.plugins.model_args import ModelArgs
from vislm.eval.plugins.requests import Generation, Question, question, target_text

_MOST_ROUNDS = 64


class Vislm(lmms):
    """An LMM with pruned visual tokens and reweighted heads, as a simple model of lmms-eval 0.7.

    Args:
        model_args: as ``key=value``: pretrained (a name, folder or hub name), prune and heads
            (``NAME:OPTION=VALUE,...``; several joined by ``;``; quoted where commas are in it), dtype, device,
            batch_size.

    Raises:
        UnknownName: an argument, method or option that there is not.
    """

    is_simple = True

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        from vislm.lmm.model import load_lmm

        self.arguments = ModelArgs.read(model_args)
        methods = self.arguments.interventions()  # a wrong option should not cost the time to load a model
        self.device = self._join_processes()
        self._in_force = contextlib.ExitStack()
        lmm = load_lmm(self.arguments.pretrained, dtype=self.arguments.dtype, device=self.device)
        self.lmm = self._in_force.enter_context(lmm.using(*methods))
        self.answerer = Answerer(self.lmm, self.arguments.batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return one answer per request (context, gen_kwargs, doc_to_visual, doc_id, task, split), in their order."""
        questions, how = [], []
        for context, options, doc_to_visual, *place in (request.args for request in requests):
            questions.append(question(context, doc_to_visual(self._document(*place))))
            how.append(Generation.read(options))
        texts = self.answerer.generate(questions, how)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), text)
        self._report_faults()
        return texts

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Return the answers of all rounds per request.

        From the second round on the task's doc_to_text gives pictures, context, whether it was the last round, the
        answers so far and what it wants to be told next.

        Raises:
            RuntimeError: a task that does not end.
        """
        found = [self._rounds(*request.args) for request in requests]
        self._report_faults()
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return per request (loss of the continuation, whether it is what greedy decoding says).

        lmms-eval 0.7 calls the first number a log-likelihood and then takes the smallest as the model's choice, so its
        own models return the mean negative log-probability per token; so does this one.
        """
        return [self._loss(*request.args) for request in requests]

    def clean(self) -> None:
        """Take the methods off and free the model."""
        self._in_force.close()
        super().clean()

    def _rounds(
        self, context: str, options: dict[str, Any], doc_to_visual: Any, doc_to_text: Any, *place: Any
    ) -> list[str]:
        document, how = self._document(*place), Generation.read(options)
        asked, answers, info = question(context, doc_to_visual(document)), list[str](), None
        for number in range(1, _MOST_ROUNDS + 1):
            answers += self.answerer.generate([asked], [how])
            visuals, context, last, so_far, info = doc_to_text(
                document, previous_output=list(answers), round_idx=number, previous_round_info=info
            )
            answers = [str(text) for text in so_far] if so_far is not None else answers
            if last:
                return answers
            asked = question(context, visuals)
        raise RuntimeError(f"{place}: {_MOST_ROUNDS} rounds without an end")

    def _loss(self, context: str, target: Any, doc_to_visual: Any = None, *place: Any) -> tuple[float, bool]:
        visuals = doc_to_visual(self._document(*place)) if doc_to_visual is not None else None
        continuation = target_text(target, lambda: self._document(*place))
        asked: Question = question(context, visuals)
        return self.answerer.loss(asked, continuation)

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _join_processes(self) -> str:
        """Take this process's share under ``accelerate launch``; return the device."""
        device = self.arguments.device
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return device
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        return str(self.accelerator.device) if device == "cuda" else device

    def _report_faults(self) -> None:
        for message, count in self.answerer.faults.items():
            logging.getLogger("vislm").error("%d requests answered by nothing: %s", count, message)
        self.answerer.faults.clear()
