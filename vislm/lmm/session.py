"""Running a transformers LMM under a plan, and leaving it exactly as it was."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vislm.errors import UsageError
from vislm.lmm import attention
from vislm.lmm.adapters import Adapter, adapter_for
from vislm.lmm.attention import AttentionCall
from vislm.lmm.cost import DecoderShape, TowerShape
from vislm.lmm.decoder import DecoderPart
from vislm.lmm.head_scaling import HeadPart
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import Intervention
from vislm.lmm.plan import Plan, compile_plan
from vislm.lmm.prompt import PromptMap, PromptPart
from vislm.lmm.run import Run, clock
from vislm.lmm.tower import TowerPart, TowerState


class Session:
    """Interventions attached to one model. Use :func:`attach` or ``lmm.using``; read :attr:`last_run` afterwards."""

    def __init__(self, adapter: Adapter, interventions: Sequence[Intervention]) -> None:
        self.adapter = adapter
        self.plan: Plan = compile_plan(interventions, adapter)
        self.last_run: Run | None = None
        self.phase: Literal["prefill", "decode"] | None = None
        self.prompt: PromptMap | None = None
        self.prompt_mask: Tensor | None = None
        self._pending: Run | None = None  # encoded images whose prompt has not come yet
        self._started = self._tower_started = 0.0
        self._hooks = Hooks()
        self._implementations: dict[str, str] = {}
        self._tower = TowerPart(self, self.plan.tower) if self.plan.tower else None
        self._prompt = PromptPart(self, self.plan.prompt, self.plan.drops_before_language, self.plan.positions)
        self._decoder = DecoderPart(self, self.plan.language) if self.plan.language else None
        self._heads = HeadPart(self, self.plan.heads) if self.plan.heads else None
        self._decoder_shape = DecoderShape.of(adapter.config.text_config)
        self._tower_shape = TowerShape.of(adapter.config, adapter.tower_prefix)

    @property
    def run(self) -> Run:
        """The run in progress."""
        run = self._pending or self.last_run
        if run is None:
            run = self._pending = Run()
        return run

    @property
    def tower_state(self) -> TowerState | None:
        """Which patches the tower has kept in its last encoding; None if no method prunes it."""
        return self._tower.state if self._tower else None

    # -- installing --------------------------------------------------------------------------------------------------
    def install(self) -> None:
        """Add the hooks and select vislm's attention function where attention must be seen."""
        try:
            self._select_attention()
            self._hooks.before(self.adapter.tower, self._before_tower)
            self._hooks.after(self.adapter.tower, self._after_tower)
            if self._tower:
                self._tower.install(self._hooks)
            self._hooks.before(self.adapter.model, self._before_model)
            self._hooks.after(self.adapter.model, self._after_model, always=True)
            if self._decoder:
                self._decoder.install(self._hooks)
            if self.plan.watches_language:
                for number, module in enumerate(self.adapter.attentions):
                    self._hooks.watch(module, lambda call, out, n=number: self._attention(n, call, out))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything off again; safe to call at any time."""
        self._hooks.remove()
        if self._implementations:
            self.adapter.model.set_attn_implementation(self._implementations)
            self._implementations = {}
        self.phase, self.prompt, self.prompt_mask, self._pending = None, None, None, None

    def _select_attention(self) -> None:
        needed = {"vision_config": bool(self._tower), "text_config": self.plan.watches_language}
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
    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.phase is None:  # else the model encodes its images itself, within the run that has begun
            self._pending = Run()
        self._tower_started = clock(self.adapter.model.device)

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        elapsed = clock(self.adapter.model.device) - self._tower_started
        self.run.seconds["tower"] += elapsed
        if self.phase is not None:
            self._started += elapsed  # the tower ran inside the model's forward; prefill does not include it

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        kwargs = named_arguments(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if cached == 0:
            self._begin_prefill(kwargs, cache)
        else:
            if self.prompt is None:
                raise UsageError("the cache was filled before the interventions were attached; start with a new cache")
            self.phase = "decode"
            self._prompt.decode(kwargs, self.prompt, cached)
        self._started = clock(self.adapter.model.device)
        return (), kwargs

    def _begin_prefill(self, kwargs: dict[str, Any], cache: Any) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:  # made for a static cache; the last row sees all valid columns
            last = mask[:, 0, -1, : ids.shape[1]] if ids is not None else mask[:, 0, -1]
            mask = last if last.dtype == torch.bool else last >= 0
        if self.plan.watches_language and mask is not None and not bool(mask[:, -1].all()):
            raise UsageError("signals are taken at the last column: pad prompts on the left (padding_side='left')")
        if self._decoder:
            self._decoder.start(cache)
        if self._heads:
            self._heads.start(ids, mask)
        if self._pending is None or kwargs.get("pixel_values") is not None:
            self._pending = Run()
        self.phase, self.prompt = "prefill", None
        self.prompt = self._prompt.prefill(kwargs)
        run = self.last_run = self.run
        self._pending = None
        self.prompt_mask = kwargs.get("attention_mask")
        run.batch, run.prompt_tokens = self.prompt.index.shape[0], self.prompt.length
        if run.features is not None:
            run.visual_tokens = [len(f) for f in run.features]
        elif ids is not None:
            numbers = self.prompt.image_of[self.prompt.image_of >= 0]
            run.visual_tokens = numbers.bincount().tolist()
        if self.tower_state:
            run.tower_tokens = self.tower_state.lengths

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run, phase, self.phase = self.last_run, self.phase, None
        if run is None or phase is None or output is None:
            return
        run.seconds[phase] += clock(self.adapter.model.device) - self._started
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])
        lengths = [layer.keys.shape[-2] for layer in layers if getattr(layer, "keys", None) is not None]
        if phase == "prefill":
            run.layer_tokens = lengths or [self.prompt.index.shape[1] if self.prompt else 0] * len(self.adapter.layers)
            self._count(run)
        else:
            run.new_tokens += 1
        run.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers[: len(lengths)])

    def _count(self, run: Run) -> None:
        images = len(run.visual_tokens)
        full = [run.prompt_tokens] * len(self.adapter.layers)
        projected = run.tower_tokens[-1] if run.tower_tokens else None
        beside = self._decoder_shape.layer_flops(self._heads.text_tokens) if self._heads else 0
        run.flops = {
            "tower": images * self._tower_shape.flops(run.tower_tokens, projected),
            "prefill": run.batch * (self._decoder_shape.prefill_flops(run.layer_tokens) + beside),
            "full_tower": images * self._tower_shape.flops(None),
            "full_prefill": run.batch * self._decoder_shape.prefill_flops(full),
        }

    def _attention(self, number: int, call: AttentionCall, out: Tensor) -> Tensor:
        if self.phase is None:
            return out
        if self._decoder and self.phase == "prefill" and not (self._heads and self._heads.in_text_stream):
            self._decoder.observe(number, call)
        return self._heads.apply(number, call, out) if self._heads else out

    @staticmethod
    def first_layer_keys(cache: Any) -> int:
        """Return how many keys decoder layer 0 holds now."""
        return cache.layers[0].keys.shape[-2]


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
