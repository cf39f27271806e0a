"""The searches: each fills a journal with findings by key and returns the entries of an artefact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vislm.calibration.captions import read_caption, word_probabilities, write_caption
from vislm.calibration.journal import Journal
from vislm.calibration.row_heads import Edited, Head, RowHeads, calibrated, zero_tuned
from vislm.calibration.samples import Sample
from vislm.calibration.scores import Scorer
from vislm.calibration.settings import Settings
from vislm.errors import UsageError
from vislm.eval.captions.vocabulary import Vocabulary
from vislm.heads.zerotuning import ZeroTuning
from vislm.lmm.model import LMM

LEAST_GAIN = 1e-5
"""A smaller difference between scores is rounding."""

Tick = Callable[[int], None]
"""Told how many heads were just done."""


@dataclass(frozen=True)
class Search:
    """What all searches need."""

    lmm: LMM
    samples: Sequence[Sample]
    settings: Settings
    journal: Journal
    tick: Tick

    @property
    def heads(self) -> list[Head]:
        """The heads that are tried, layer by layer."""
        layers = self.settings.chosen_layers(len(self.lmm.adapter.layers))
        return [(layer, head) for layer in layers for head in range(self.lmm.adapter.text_config.num_attention_heads)]

    def missing(self) -> Iterator[RowHeads]:
        """Yield the heads without a finding, a batch at a time; the last batch is filled with rows without a head."""
        todo = [pair for pair in self.heads if key(pair) not in self.journal.found]
        size = self.settings.batch_size
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            yield RowHeads((*batch, *[None] * (size - len(batch))))
            self.tick(len(batch))


def key(pair: Head) -> str:
    """Return a head's key in the journal."""
    return f"{pair[0]}/{pair[1]}"


def attribute(search: Search, vocabulary: Vocabulary) -> list[Head]:
    """Return the heads with the largest influence on hallucinated object words against correct ones (AD-HH).

    The influence of a head on a word is p(word) - p(word | its output is zero), with the model's own caption up to
    there as context; its means over both kinds of words are compared.
    """
    lmm, found = search.lmm, search.journal.found
    captions = []
    for number, sample in enumerate(search.samples):
        if (name := f"caption {number}") not in found:
            search.journal.add({name: write_caption(lmm, sample, search.settings.max_new_tokens)})
        captions.append(read_caption(lmm, sample, found[name], vocabulary))
    captions = [caption for caption in captions if caption.places]
    wrong = torch.tensor([kind for caption in captions for kind in caption.hallucinated], dtype=torch.bool)
    if not bool(wrong.any()) or bool(wrong.all()):
        raise UsageError(f"{int(wrong.sum())} of {len(wrong)} object words are hallucinated; use more --num-samples")
    plain = torch.cat([word_probabilities(lmm, caption, RowHeads((None,)))[0] for caption in captions])
    for rows in search.missing():
        changed = torch.cat([word_probabilities(lmm, caption, rows) for caption in captions], 1)
        effect = (plain - changed).double()
        means = {True: effect[:, wrong].mean(1).tolist(), False: effect[:, ~wrong].mean(1).tolist()}
        search.journal.add(
            {
                key(pair): {"hallucinated": bad, "correct": good}
                for pair, bad, good in zip(rows.heads, means[True], means[False], strict=True)
                if pair is not None
            }
        )

    def influence(pair: Head) -> float:
        return found[key(pair)]["hallucinated"] - found[key(pair)]["correct"]

    return sorted(search.heads, key=influence, reverse=True)[: search.settings.top]


def search_act(search: Search) -> list[Head]:
    """Return the heads whose calibration alone raises the score (ACT)."""
    settings = search.settings

    def attempt(rows: RowHeads) -> list[Edited]:
        return [calibrated(rows, settings.beta, settings.threshold, "first_found")]

    _profile(search, attempt)
    found = search.journal.found
    return [pair for pair in search.heads if found[key(pair)][0] > found["baseline"] + LEAST_GAIN]


def search_zerotuning(search: Search) -> list[tuple[int, int, float]]:
    """Return the larger class of heads that gain by a larger, or by a smaller factor, with the best factor for all.

    Empty if no factor raises the score (ZeroTuning).
    """
    settings, found = search.settings, search.journal.found

    def attempt(rows: RowHeads) -> list[Edited]:
        return [zero_tuned(rows, settings.up), zero_tuned(rows, settings.down)]

    _profile(search, attempt)
    least = found["baseline"] + LEAST_GAIN
    classes = [[pair for pair in search.heads if found[key(pair)][way] > least] for way in (0, 1)]
    heads = max(classes, key=len)
    gammas = [g for g in settings.gammas if (g > 1.0) == (heads is classes[0])]
    if not heads:
        return []
    scorer = Scorer(search.lmm, search.samples, settings.score)
    names = {gamma: f"gamma {gamma} of {'+'.join(map(key, heads))}" for gamma in gammas}
    for gamma, name in names.items():
        if name not in found:
            search.journal.add({name: scorer(ZeroTuning(heads=tuple(heads), gamma=gamma), 1)[0]})
    best = max(gammas, key=lambda gamma: found[names[gamma]])
    return [(*pair, best) for pair in heads] if found[names[best]] > least else []


def _profile(search: Search, attempt: Callable[[RowHeads], list[Edited]]) -> None:
    """Note the untouched model's score, and a list of scores for each head: one per edit."""
    scorer = Scorer(search.lmm, search.samples, search.settings.score)
    if "baseline" not in search.journal.found:
        search.journal.add({"baseline": scorer(Edited(RowHeads((None,)), lambda view: view.softmax()), 1)[0]})
    for rows in search.missing():
        scores = [scorer(method, len(rows.heads)) for method in attempt(rows)]
        pairs = enumerate(rows.heads)
        search.journal.add({key(pair): [own[row] for own in scores] for row, pair in pairs if pair is not None})
