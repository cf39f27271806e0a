"""Beam search over one sample, with a stage that judges the candidates, looks ahead, and can go back.

Where nothing is judged it finds what transformers' own beam search finds. ``generate`` calls it as its strategy, so
that prompts, caches, logits processors and stopping criteria are what they always are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from vislm.errors import UsageError
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import SearchStage, SearchView
from vislm.lmm.prompt.pruning import refuse_static_cache
from vislm.lmm.state import SessionState

NEVER = -1e9
"""Score of a beam that must not be chosen."""


@dataclass(frozen=True)
class Beams:
    """R beams after t tokens, all read by the model."""

    tokens: Tensor
    """(R, t)."""
    scores: Tensor
    """(R,) sums of log-probabilities."""
    state: dict[str, Tensor]
    finished: tuple[tuple[float, Tensor], ...] = ()
    """The R best sequences that have ended so far, best first: score with length penalty, tokens."""


@dataclass
class Choice:
    """One step's outcome before the model has read it."""

    parents: Tensor
    """(R,) rows that the new beams continue."""
    words: Tensor
    """(R,)."""
    beams: Beams
    over: bool
    """Whether nothing better can come."""


class SearchPart:
    """Makes ``generate`` use the stage's beam search."""

    def __init__(self, shared: SessionState, owner: int, stage: SearchStage) -> None:
        self.shared, self.owner, self.stage = shared, owner, stage

    @property
    def _name(self) -> str:
        return self.shared.names[self.owner]

    def install(self, hooks: Hooks) -> None:
        """Wrap the model's ``generate``."""
        hooks.wrap(self.shared.adapter.model, "generate", self._generate)

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        call = named_arguments(self.shared.adapter.model, args, kwargs, "generate")
        if call.get("custom_generate") is not None or call.get("assistant_model") is not None:
            raise UsageError(
                f"{self._name} is a decoding strategy of its own; leave out custom_generate and assistant_model"
            )
        if call.get("generation_config") is None:
            call.setdefault("num_beams", self.stage.num_beams)
        call["custom_generate"] = self._search
        return generate(**call)

    def _search(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        check_options(generation_config, input_ids, model_kwargs, self._name)
        search = BeamSearch(
            Reader(model, input_ids, model_kwargs), self.stage, generation_config, logits_processor, stopping_criteria
        )
        prefill = search.reader.prefill()
        run = self.shared.run
        best, raw = search.run(prefill, run.memory[self.owner])
        run.new_tokens = len(raw) - 1
        return _output(input_ids, best, raw, generation_config, search.reader.cache)


def check_options(config: Any, input_ids: Tensor, kwargs: dict[str, Any], name: str) -> None:
    """Raise ``UsageError`` for what the search of the method ``name`` cannot do."""
    refuse_static_cache(kwargs.get("past_key_values"), name)
    if config.do_sample:
        raise UsageError(f"do_sample=True: {name} does not sample; use do_sample=False")
    if input_ids.shape[0] != max(config.num_beams, config.num_return_sequences):
        raise UsageError(
            f"{name} searches one sample at a time: call generate with a batch of 1, or lmm.ask, which goes through a "
            "list of questions by itself"
        )
    if config.num_return_sequences > config.num_beams:
        raise UsageError(f"num_return_sequences={config.num_return_sequences} with num_beams={config.num_beams}")
    for name in ("output_scores", "output_attentions", "output_hidden_states", "prefill_chunk_size"):
        if getattr(config, name, None):
            raise UsageError(f"{name} is not available with a beam search that goes back; leave it out")
    if not config.use_cache or kwargs.get("past_key_values") is None or kwargs["past_key_values"].get_seq_length():
        raise UsageError("a beam search that goes back needs use_cache=True and an empty cache")


class Reader:
    """Feeds tokens to the model and takes them back."""

    def __init__(self, model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.model, self.input_ids, self.kwargs = model, input_ids, kwargs
        self.cache = kwargs["past_key_values"]
        self.fed = 0

    def prefill(self) -> Tensor:
        """Return the logits (R, V) behind the prompt."""
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, is_first_iteration=True, **self.kwargs)
        return self.model(**inputs, return_dict=True).logits[:, -1].float()

    def feed(self, tokens: Tensor) -> Tensor:
        """Let the beams read one token each, (R,); return the logits (R, V) behind it."""
        mask, positions = self.kwargs.get("attention_mask"), self.kwargs["position_ids"]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), self.fed + 1)], 1)
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=(positions[..., -1:] + 1 + self.fed).expand(*positions.shape[:-2], len(tokens), 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.fed += 1
        return out.logits[:, -1].float()

    def take_back(self, count: int) -> None:
        """Forget the last tokens."""
        self.cache.crop(-count)
        self.fed -= count

    def look(self, tokens: Tensor) -> None:
        """Read one token each (R,) and forget it."""
        self.feed(tokens)
        self.take_back(1)


class BeamSearch:
    """The loop over steps."""

    def __init__(self, reader: Reader, stage: SearchStage, config: Any, processors: Any, criteria: Any) -> None:
        self.reader, self.stage, self.config = reader, stage, config
        self.processors, self.criteria = processors, criteria
        ends = config._eos_token_tensor
        self.wanted = max(2, 1 + (0 if ends is None else len(ends))) * config.num_beams

    def run(self, logits: Tensor, memory: dict[str, Any]) -> tuple[tuple[tuple[float, Tensor], ...], list[Tensor]]:
        """Search from the logits (R, V) behind the prompt.

        Returns:
            The R best sequences, best first, as (score, tokens (t,)); and every step's logits (R, V).
        """
        rows, device = logits.shape[0], logits.device
        scores = torch.full((rows,), NEVER, device=device)
        scores[0] = 0.0  # all beams begin alike, so only one of them may
        history = [Beams(torch.empty(rows, 0, dtype=torch.long, device=device), scores, {})]
        raw, forbidden = [logits], {0: torch.zeros_like(logits, dtype=torch.bool)}
        while True:
            beams, step = history[-1], len(history) - 1
            judged = self.stage.judge(self._view(beams, logits, memory))
            choice = self._choose(beams, _without(judged, forbidden[step]))
            if choice.over:
                return choice.beams.finished, raw
            forbidden[step][choice.parents, choice.words] = True
            self.reader.cache.reorder_cache(choice.parents)
            logits = self.reader.feed(choice.words)
            view = self._view(choice.beams, logits, memory)
            self.stage.read(view)
            keep = self.stage.go_back(view)
            if keep is None:
                history.append(replace(choice.beams, state=view.state))
                raw.append(logits)
                forbidden[step + 1] = torch.zeros_like(logits, dtype=torch.bool)
            else:
                del history[keep + 1 :], raw[keep + 1 :]
                logits = self._reread(history[-1].tokens, raw[0])

    def _view(self, beams: Beams, logits: Tensor, memory: dict[str, Any]) -> SearchView:
        return SearchView(logits, beams.tokens, dict(beams.state), self.reader.look, memory)

    def _reread(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Let the model read tokens (R, t) behind the prompt, whose keys all beams share; return the logits (R, V)."""
        self.reader.take_back(self.reader.fed)
        for column in tokens.unbind(1):
            logits = self.reader.feed(column)
        return logits

    def _choose(self, beams: Beams, logits: Tensor) -> Choice:
        rows, prompt = len(beams.tokens), self.reader.input_ids
        read = torch.cat([prompt, beams.tokens], 1)
        totals = beams.scores[:, None] + self.processors(read, logits.log_softmax(-1))
        top, index = totals.flatten().topk(self.wanted)
        parents, words = index // logits.shape[1], index % logits.shape[1]
        sequences = torch.cat([read[parents], words[:, None]], 1)
        ended = self.criteria(sequences, None)
        finished = self._finished(beams, sequences[:, prompt.shape[1] :], top, ended)
        open_scores, order = (top + ended * NEVER).topk(rows)
        parents, words = parents[order], words[order]
        state = {name: values[parents] for name, values in beams.state.items()}
        tokens = sequences[order, prompt.shape[1] :]
        over = bool(ended.all()) or self._settled(finished, float(open_scores[0]), tokens.shape[1])
        return Choice(parents, words, Beams(tokens, open_scores, state, finished), over)

    def _finished(
        self, beams: Beams, tokens: Tensor, scores: Tensor, ended: Tensor
    ) -> tuple[tuple[float, Tensor], ...]:
        """Return the best ended sequences, with those that end now among this step's R best."""
        rows, penalty = len(beams.tokens), tokens.shape[1] ** self.config.length_penalty
        new = [(float(scores[n]) / penalty, tokens[n]) for n in range(rows) if ended[n]]
        return tuple(sorted([*beams.finished, *new], key=lambda entry: -entry[0])[:rows])

    def _settled(self, finished: tuple[tuple[float, Tensor], ...], best: float, length: int) -> bool:
        """Return whether no open beam, the best of which scores ``best``, can still enter the finished ones."""
        if len(finished) < self.config.num_beams:
            return False
        if self.config.early_stopping is True:
            return True
        penalty = self.config.length_penalty
        if self.config.early_stopping == "never" and penalty > 0.0:
            length = self.config.max_length - self.reader.input_ids.shape[1]
        return best / length**penalty <= finished[-1][0]


def _without(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Return logits (R, V) with -inf at forbidden tokens; a beam that would have none left keeps them all."""
    left = logits.masked_fill(forbidden, -torch.inf)
    return torch.where(left.isneginf().all(-1, keepdim=True), logits, left)


def _output(
    prompt: Tensor, best: tuple[tuple[float, Tensor], ...], raw: list[Tensor], config: Any, cache: Any
) -> GenerateBeamDecoderOnlyOutput | Tensor:
    chosen = best[: config.num_return_sequences]
    pad, ends = config._pad_token_tensor, config._eos_token_tensor
    fill = int(pad) if pad is not None else int(ends[0]) if ends is not None else -1
    longest = max(len(tokens) for _, tokens in chosen)
    sequences = prompt.new_full((len(chosen), prompt.shape[1] + longest), fill)
    for row, (_, tokens) in enumerate(chosen):
        sequences[row, : prompt.shape[1] + len(tokens)] = torch.cat([prompt[0], tokens])
    if not config.return_dict_in_generate:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,  # pyright: ignore[reportArgumentType]
        sequences_scores=torch.tensor([score for score, _ in chosen], device=prompt.device),  # pyright: ignore[reportArgumentType]
        logits=tuple(raw) if config.output_logits else None,  # pyright: ignore[reportArgumentType]
        past_key_values=cache,
    )
