"""Writing a draft of the answer first, for methods that look at one before they act.

Around ``generate``, because only there is one call that knows everything the answer depends on; the draft passes
through the same session, so that it is made under the other methods in force (a pruner's tokens are gone in it too).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import EditStage
from vislm.lmm.state import SessionState

_ANSWER_ONLY = (
    "assistant_model",
    "early_stopping",
    "length_penalty",
    "max_length",
    "min_length",
    "min_new_tokens",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prompt_lookup_num_tokens",
    "stopping_criteria",
    "streamer",
)
"""Arguments of ``generate`` that say something about the answer and not about its beginning."""


class Drafts:
    """Runs every ``generate`` twice where a stage wants a draft: greedily for a few tokens, then as it was called."""

    def __init__(self, shared: SessionState, stages: list[tuple[int, EditStage]]) -> None:
        self.shared = shared
        self.tokens = {owner: stage.draft for owner, stage in stages if stage.draft}
        self.writing = False
        self._left: dict[int, dict[str, Any]] = {}

    def install(self, hooks: Hooks) -> None:
        """Put the draft in front of the model's ``generate``, if anybody wants one."""
        if self.tokens:
            hooks.wrap(self.shared.adapter.model, "generate", self._generate)

    def turn_of(self, owner: int, stage: EditStage) -> bool:
        """Return whether it is this stage's turn: in the draft, those that look at it; in the answer, all others.

        Stages of other methods act in both, but those that only look wait for the answer.
        """
        if owner in self.tokens:
            return self.writing == bool(stage.draft)
        return not (self.writing and stage.observes)

    def hand_over(self, owner: int, memory: dict[str, Any]) -> None:
        """Put what a method's draft left behind into its memory of the answer.

        Raises:
            PlanConflict: the model was called directly, so that there is no draft.
        """
        if self.writing or owner not in self.tokens or "draft_tokens" in memory:
            return
        if owner not in self._left:
            raise PlanConflict(
                f"{self.shared.names[owner]} reads a draft of the answer first: call model.generate or lmm.ask, not "
                "the model itself"
            )
        memory.update(self._left[owner])

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        if self.writing:
            return generate(*args, **kwargs)
        call = named_arguments(self.shared.adapter.model, args, kwargs, "generate")
        self._check(call)
        self.writing = True
        try:
            sequences = generate(**self._plain(call))
        finally:
            self.writing = False
        self._keep(sequences, call)
        try:
            return generate(*args, **kwargs)
        finally:
            self._left = {}

    def _check(self, call: dict[str, Any]) -> None:
        if call.get("past_key_values") is not None:
            names = " and ".join(self.shared.names[owner] for owner in self.tokens)
            raise UsageError(f"{names}: a draft is written first, which would fill past_key_values; leave it out")

    def _plain(self, call: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in call.items() if name not in _ANSWER_ONLY}
        count = max(self.tokens.values())
        greedy = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
        return {**kept, "max_new_tokens": count, **greedy}

    def _keep(self, sequences: Tensor, call: dict[str, Any]) -> None:
        prompt = call["input_ids"] if call.get("input_ids") is not None else call["inputs"]
        end = self._option(call, "eos_token_id")
        end = torch.as_tensor([] if end is None else end, device=sequences.device, dtype=sequences.dtype)
        is_end = torch.isin(sequences[:, prompt.shape[1] :], end).int()
        lengths = (is_end.cumsum(-1) - is_end == 0).sum(-1)
        run = self.shared.last_run
        assert run is not None
        self._left = {owner: {**run.memory[owner], "draft_tokens": lengths} for owner in self.tokens}

    def _option(self, call: dict[str, Any], name: str) -> Any:
        """Return an option of ``generate`` from the call, its configuration or the model's."""
        if call.get(name) is not None:
            return call[name]
        config = call.get("generation_config") or self.shared.adapter.model.generation_config
        return getattr(config, name, None)
