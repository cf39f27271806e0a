"""Running a transformers LMM under a plan, and leaving it exactly as it was."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter, adapter_for
from vislm.lmm.adapters.base import PIXELS
from vislm.lmm.cost.flops import DecoderShape
from vislm.lmm.cost.scoring import timed_plan
from vislm.lmm.cost.tower import tower_flops
from vislm.lmm.decoder import attention
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.edits import EditPart
from vislm.lmm.decoder.head_scaling import HeadPart
from vislm.lmm.decoder.logit_bias import BiasPart
from vislm.lmm.decoder.pruning import DecoderPart
from vislm.lmm.decoder.row_order import MemoryRows
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import Intervention
from vislm.lmm.logits.beam_search import SearchPart
from vislm.lmm.logits.mixing import LogitsPart
from vislm.lmm.plan import Plan, compile_plan
from vislm.lmm.prompt.pruning import PromptPart
from vislm.lmm.prompt.visuals import Encoding
from vislm.lmm.run import Run, clock
from vislm.lmm.state import SessionState, valid_columns
from vislm.lmm.tower.merging import MergeState, TowerMergePart
from vislm.lmm.tower.packed import PackedState, PackedTowerPart
from vislm.lmm.tower.pruning import TowerPart, TowerState, mix_survivors


class Session:
    """Interventions attached to one model. Use :func:`attach` or ``lmm.using``; read :attr:`last_run` afterwards."""

    def __init__(self, adapter: Adapter, interventions: Sequence[Intervention]) -> None:
        self.adapter = adapter
        self._state = SessionState(adapter, tuple(str(getattr(item, "name", item)) for item in interventions))
        self.plan: Plan = timed_plan(compile_plan(interventions, adapter), self._state)
        self._started = 0.0
        self._cached = self._new_columns = 0
        self._hooks = Hooks()
        self._implementations: dict[str, str] = {}
        self._prompt = PromptPart(
            self._state,
            self.plan.prompt,
            self.plan.drops_before_language,
            self.plan.positions,
            tower_merges=bool(self.plan.tower_merges),
        )
        self._tower = self._tower_part()
        self._decoder = DecoderPart(self._state, self.plan.language) if self.plan.language else None
        self._biases = None
        if self.plan.biases:
            self._biases = BiasPart(self._state, self.plan.biases, self._decoder, lambda: self._in_text_stream)
        self._edits = EditPart(self._state, self.plan.edits, self._decoder) if self.plan.edits else None
        self._rows = MemoryRows(self._state, self.plan.edits)
        self._heads = HeadPart(self._state, self.plan.heads) if self.plan.heads else None
        self._logits = LogitsPart(self._state, self.plan.logits, self._hooks.pause) if self.plan.logits else None
        self._search = SearchPart(self._state, *self.plan.search[0]) if self.plan.search else None
        self._decoder_shape = DecoderShape.of(adapter.text_config)

    @property
    def last_run(self) -> Run | None:
        """What the last call did; None before the first."""
        return self._state.last_run

    @property
    def one_at_a_time(self) -> bool:
        """Whether a decoding strategy is in force that takes one sample per call of ``generate``."""
        return self._search is not None

    @property
    def questions(self) -> list[str] | None:
        """The samples' questions in plain text, for methods that read them; ``lmm.ask`` sets them by itself."""
        return self._state.questions

    @questions.setter
    def questions(self, questions: Sequence[str] | None) -> None:
        self._state.questions = None if questions is None else list(questions)

    def _tower_part(self) -> TowerPart | PackedTowerPart | TowerMergePart | None:
        if self.plan.tower_merges:
            assert self._prompt.recorder is not None
            return TowerMergePart(self._state, self.plan.tower_merges, self._prompt.recorder)
        if self.plan.tower and self.adapter.packed_tower:
            stages = {layer: stage for layer, (_, stage) in self.plan.tower.items()}
            return PackedTowerPart(self.adapter.tower, stages, self.adapter.cell)
        return TowerPart(self._state, self.plan.tower) if self.plan.tower else None

    @property
    def tower_state(self) -> TowerState | PackedState | MergeState | None:
        """Which patches the tower has kept in its last encoding; None if no method prunes it."""
        return self._tower.state if self._tower else None

    # -- installing --------------------------------------------------------------------------------------------------
    def install(self) -> None:
        """Add the hooks and select vislm's attention function where attention must be seen."""
        try:
            self._select_attention()
            self._hooks.after(self.adapter.tower, self._after_tower)
            if self._tower:
                self._tower.install(self._hooks)
                for name in self.adapter.mixers:
                    self._hooks.wrap(self.adapter.inner, name, mix_survivors)
            if self._prompt.recorder:
                self._prompt.recorder.install(self._hooks)
            for modality in self.adapter.visual_ids:
                around = functools.partial(self._encoding, modality)
                self._hooks.wrap(self.adapter.inner, f"get_{modality}_features", around)
            self._hooks.before(self.adapter.model, self._before_model)
            self._hooks.after(self.adapter.model, self._after_model, always=True)
            if self._decoder:
                self._decoder.install(self._hooks)
            if self._biases:
                self._biases.install(self._hooks)
            if self._edits:
                self._edits.install(self._hooks)
            if self._logits:
                self._logits.install(self._hooks)
            if self._search:
                self._search.install(self._hooks)
            self._watch_language()
        except BaseException:
            self.remove()
            raise

    def _watch_language(self) -> None:
        edited = self._edits.layers if self._edits else frozenset()
        for number, module in enumerate(self.adapter.attentions):
            if number in edited:
                self._hooks.surround(module, lambda call, fused, n=number: self._edited(n, call, fused))
            if self._decoder or self._heads:
                self._hooks.watch(module, lambda call, out, n=number: self._attention(n, call, out))

    def remove(self) -> None:
        """Take everything off again; safe to call at any time."""
        self._hooks.remove()
        if self._implementations:
            self.adapter.model.set_attn_implementation(self._implementations)
            self._implementations = {}
        if self._logits:
            self._logits.stop()
        self._rows.stop()
        self._state.clear()

    def _select_attention(self) -> None:
        tower = bool(self._tower or (self._prompt.recorder and self._prompt.recorder.wanted))
        needed = {"vision_config": tower, "text_config": self.plan.watches_language}
        before = {k: getattr(self.adapter.config, k)._attn_implementation for k, wanted in needed.items() if wanted}
        for key, name in before.items():
            if name not in ("sdpa", attention.NAME):
                raise UsageError(
                    f"the model's {key} uses attn_implementation={name!r}; vislm computes what 'sdpa' computes, so "
                    "load the model with attn_implementation='sdpa'"
                )
        self._implementations = before
        if before:
            self.adapter.model.set_attn_implementation(dict.fromkeys(before, attention.NAME))

    # -- hooks -------------------------------------------------------------------------------------------------------
    def _encoding(self, modality: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember how the images were cut into crops; later nobody says so."""
        state = self._state
        if state.encoding is not None:  # a family that encodes videos by its method for images
            return encode(*args, **kwargs)
        if state.phase is None and (state.pending is None or modality in state.encodings):
            state.pending = Run()
            state.encodings.clear()
        state.encoding = modality
        started = clock(self.adapter.model.device)
        try:
            output = encode(*args, **kwargs)
        finally:
            state.encoding = None
        state.run.seconds["tower"] += clock(self.adapter.model.device) - started
        arguments = named_arguments(self.adapter.inner, args, kwargs, f"get_{modality}_features")
        pooled = output if hasattr(output, "pooler_output") else SimpleNamespace(pooler_output=output[1])
        state.encodings[modality] = Encoding(arguments, self.adapter.entry_lengths(pooled))
        return output

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run = self._state.run
        spent, flops = tower_flops(self.adapter, named_arguments(module, args, kwargs), self.tower_state), run.flops
        run.flops = flops | {kind: flops.get(kind, 0) + count for kind, count in spent.items()}

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        kwargs = named_arguments(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        self._cached = cached
        if self._logits:
            self._logits.start(kwargs, cached)
        if cached == 0:
            self._begin_prefill(kwargs, cache)
        else:
            if self._state.prompt is None:
                raise UsageError("the cache was filled before the interventions were attached; start with a new cache")
            self._state.phase = "decode"
            self._prompt.decode(kwargs, self._state.prompt, cached)
            self._state.positions = kwargs.get("position_ids")
        self._started = clock(self.adapter.model.device)
        return (), kwargs

    def _begin_prefill(self, kwargs: dict[str, Any], cache: Any) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        mask = valid_columns(mask, 0 if ids is None else ids.shape[1])
        looks = self.plan.watches_language or self.plan.logits
        if looks and mask is not None and not bool(mask[:, -1].all()):
            raise UsageError("signals are taken at the last column: pad prompts on the left (padding_side='left')")
        self._rows.stop()
        if self._decoder:
            self._decoder.start(cache)
        if self._heads:
            self._heads.start(ids, mask)
        if self._state.pending is None or any(kwargs.get(pixels) is not None for pixels in PIXELS.values()):
            self._state.pending = Run()
            self._state.encodings.clear()
        self._state.phase, self._state.prompt = "prefill", None
        started, before = clock(self.adapter.model.device), self._state.run.seconds["tower"]
        self._state.prompt = self._prompt.prefill(kwargs)
        run = self._state.last_run = self._state.run
        encoding = run.seconds["tower"] - before
        run.seconds["prompt"] = clock(self.adapter.model.device) - started - encoding
        self._state.pending = None
        self._state.positions = kwargs.get("position_ids")
        self._state.prompt_mask = valid_columns(kwargs.get("attention_mask"), self._state.prompt.index.shape[1])
        run.batch, run.prompt_tokens = self._state.prompt.index.shape[0], self._state.prompt.length
        if run.features is not None:
            run.visual_tokens = [len(f) for f in run.features]
        elif ids is not None:
            numbers = self._state.prompt.image_of[self._state.prompt.image_of >= 0]
            run.visual_tokens = numbers.bincount().tolist()
        if self.tower_state:
            run.tower_tokens = self.tower_state.lengths
            run.tower_steps = self.tower_state.steps if isinstance(self.tower_state, TowerState) else []

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run, phase, self._state.phase = self._state.last_run, self._state.phase, None
        if run is None or phase is None or output is None:
            return
        run.seconds[phase] += clock(self.adapter.model.device) - self._started
        if self._logits:
            self._logits.finish(phase, output)
        if phase == "prefill":
            self._rows.follow(getattr(output, "past_key_values", None))
            self._state.encodings.clear()
            run.layer_tokens = self._columns()
            self._new_columns = 0
            self._count(run)
        else:
            run.new_tokens += 1
            self._new_columns = self._cached - run.layer_tokens[0] + _columns_of(kwargs)
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])
        filled = [layer for layer in layers if getattr(layer, "keys", None) is not None]
        run.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
        if filled:
            context = [n + self._new_columns for n in run.layer_tokens]
            run.kv_bytes_expected = run.batch * self._decoder_shape.kv_bytes(context, filled[0].keys.element_size())

    def _columns(self) -> list[int]:
        """Return how many prompt columns each decoder layer has processed."""
        prompt, depth = self._state.prompt, len(self.adapter.layers)
        assert prompt is not None
        segments = self._decoder.segments if self._decoder else [None] * depth
        return [prompt.index.shape[1] if s is None else s.index.shape[1] for s in segments]

    def _count(self, run: Run) -> None:
        full = [run.prompt_tokens] * len(self.adapter.layers)
        beside = self._decoder_shape.layer_flops(self._heads.text_tokens) if self._heads else 0
        run.flops = {
            "tower": 0,
            "full_tower": 0,
            **run.flops,
            "prefill": run.batch * (self._decoder_shape.prefill_flops(run.layer_tokens) + beside),
            "full_prefill": run.batch * self._decoder_shape.prefill_flops(full),
        }

    @property
    def _in_text_stream(self) -> bool:
        return bool(self._heads and self._heads.in_text_stream)

    def _edited(self, number: int, call: AttentionCall, fused: Callable[[], Tensor]) -> Tensor:
        if self._edits is None or self._state.phase is None or self._in_text_stream:
            return fused()
        return self._edits.apply(number, call, fused)

    def _attention(self, number: int, call: AttentionCall, out: Tensor) -> Tensor:
        if self._state.phase is None:
            return out
        if self._decoder and self._state.phase == "prefill" and not self._in_text_stream:
            self._decoder.observe(number, call)
        return self._heads.apply(number, call, out) if self._heads else out


def _columns_of(kwargs: dict[str, Any]) -> int:
    """Return how many columns a forward adds to the cache."""
    ids = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if ids is None else ids).shape[1]


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def attach(model: PreTrainedModel, *interventions: Intervention) -> Iterator[Session]:
    """Run a transformers image-text model under interventions while the context is open.

    ``model.generate`` and ``model(...)`` are used as always; token counts, cache and head outputs change as the methods
    say. On exit, also after an exception, hooks and attention implementation are what they were. Contexts nest: the
    inner one adds to the outer one.

    Args:
        model: an image-text model of a family in ``vislm.lmm.adapters.FAMILIES``, loaded with sdpa attention.
        interventions: e.g. ``FlowCut(keep=64), VHR(alpha=2.0)``.

    Raises:
        UsageError: a model without images, an unsupported family or attention implementation.
        PlanConflict: interventions that contradict each other or the model.
    """
    stack = _ATTACHED.setdefault(model, [])
    outer = stack[-1] if stack else None
    session = Session(adapter_for(model), (*(outer.plan.interventions if outer else ()), *interventions))
    if outer:
        outer.remove()
    stack.append(session)
    try:
        session.install()
        yield session
    finally:
        session.remove()
        stack.pop()
        if outer:
            outer.install()
        else:
            _ATTACHED.pop(model, None)
