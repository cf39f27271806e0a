"""SparseVLM's fixtures: one stage on given hidden states and attention, versions 1 and 2 ("plus")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact, relative
from vislm.lmm.choosing.ranking import top
from vislm.lmm.choosing.text_relevance import choose_raters, rater_scores
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import LanguageSelection, LanguageView
from vislm.token_pruning import sparsevlm, sparsevlm_plus
from vislm.token_pruning.sparsevlm import SparseVLM


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare raters, relevance, what is kept and, in version 1, what is recycled into what."""
    if not {"attention", "hidden_states"} <= set(fixture.inputs):
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known SparseVLM fixture")
    stage, out = Stage.of(fixture), fixture.outputs
    scores = rater_scores(stage.hidden[stage.visual], stage.hidden[stage.visual.stop :])
    raters = choose_raters(scores)
    yield relative("rater_score", scores[None], out["rater_score"], 1e-5, 1e-4)
    yield exact("rater_index_in_text", raters, out["rater_index_in_text"])
    raters = raters + stage.visual.stop
    yield from (_plus if "selected_head_attention_sum" in out else _first)(stage, raters, out)


@dataclass(frozen=True)
class Stage:
    """One stage as the fixture gives it."""

    hidden: Tensor
    """(S, C)."""
    visual: slice
    counts: tuple[int, ...]
    number: int
    call: AttentionCall
    """An attention whose weights are the given ones."""

    @classmethod
    def of(cls, fixture: Fixture) -> Stage:
        """Read it from the fixture."""
        options, attention = fixture.kwargs, fixture.inputs["attention"]
        visual = slice(options["pre_prompt"], options["pre_prompt"] + options["visual"])
        heads, length = attention.shape[1:3]
        one_hot = torch.eye(length)[None, None].expand(1, heads, length, length)
        # queries of logarithms against one-hot keys: the logits are ln A, and their softmax is A
        logarithm = attention.clamp(min=torch.finfo(attention.dtype).tiny).log()
        call = AttentionCall(logarithm, one_hot, one_hot, None, True, 1.0)
        if options["layer_idx"] not in sparsevlm.LAYERS:
            raise Unhandled(f"layer_idx={options['layer_idx']} is none of the stages' layers {sparsevlm.LAYERS}")
        number = sparsevlm.LAYERS.index(options["layer_idx"])
        hidden = fixture.inputs["hidden_states"][0]
        return cls(hidden, visual, tuple(options["keep_per_stage"]), number, call)

    @property
    def count(self) -> int:
        """Tokens to keep; the official code drops at least one."""
        return min(self.counts[self.number], self.visual.stop - self.visual.start - 1)

    def view(self) -> LanguageView:
        """Return what the stage's method would see in a running model."""
        length = len(self.hidden)
        image_of = torch.full((1, length), -1)
        image_of[0, self.visual] = 0
        token_of = torch.where(image_of < 0, -1, torch.arange(length) - self.visual.start)
        columns, hidden = torch.arange(length)[None], self.hidden[None]
        return LanguageView(
            signal=self.call,
            image_of=image_of,
            memory={},
            hidden=hidden,
            embeddings=hidden,
            columns=columns,
            token_of=token_of,
            visual_tokens=[self.visual.stop - self.visual.start],
            rotary=(torch.ones(1, length, 2), torch.zeros(1, length, 2)),
            size=torch.ones(1, length),
        )


def _first(stage: Stage, raters: Tensor, out: dict[str, Tensor]) -> Iterator[Comparison]:
    scores = sparsevlm.relevance(stage.call, raters)[stage.visual]
    keep = _mask(scores, stage.count)
    yield relative("relevance", scores[None], out["relevance"], 1e-5, 1e-4)
    yield exact("keep_mask", keep[None], out["keep_mask"])
    method = SparseVLM(counts=stage.counts, drop_one=True)
    candidates = sparsevlm.recycle_candidates(scores, keep, method.recycle)
    yield exact("recycle_candidates_in_visual", candidates, out["recycle_candidates_in_visual"])
    visual = stage.hidden[stage.visual]
    merged = sparsevlm.recycle(visual[candidates], method.per_cluster).tokens
    yield relative("merged_tokens", merged[None], out["merged_tokens"], 1e-3, 1e-4)
    selection = method.select(stage.number, stage.view())
    assert isinstance(selection, LanguageSelection)
    assert selection.hidden is not None
    before, behind = stage.hidden[: stage.visual.start], stage.hidden[stage.visual.stop :]
    expected = torch.cat([before, visual[out["keep_mask"][0]], out["merged_tokens"][0], behind])
    yield relative("sequence behind the stage", selection.hidden[selection.keep], expected, 1e-3, 1e-4)


def _plus(stage: Stage, raters: Tensor, out: dict[str, Tensor]) -> Iterator[Comparison]:
    """Without the rotary correction, which the fixture leaves out."""
    paid = sparsevlm_plus.received(stage.call, raters, None)[:, stage.visual]
    scores = sparsevlm_plus.relevance(paid, sparsevlm_plus.SparseVLMPlus.heads, len(raters))
    sums = out["selected_head_attention_sum"]
    yield relative("selected_head_attention_sum", paid.sum(-1), sums, 1e-4, 1e-4)
    yield relative("relevance", scores[None], out["relevance"], 1e-5, 1e-4)
    yield exact("keep_mask", _mask(scores, stage.count)[None], out["keep_mask"])


def _mask(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[top(scores, count)] = True
    return keep
