"""Fixtures of the official COCO caption scorer; its Java programs are compared, too, where they can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vislm.errors import UsageError
from vislm.eval.captions import caption_metrics
from vislm.eval.captions.caption_extras import EXTRAS, extra_score, unavailable
from vislm.eval.captions.caption_tokens import tokenise
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, exact

TOLERANCE = 1e-6
SLOW = "VISLM_SLOW_CHECKS"


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare the metrics of the tokenised captions, per picture and over all, and the tokenising."""
    data = fixture.data
    if not {"image_ids", "tokenized_hypothesis", "tokenized_references", "scores"} <= data.keys():
        raise Unhandled(f"keys {sorted(data)} belong to no known caption fixture")
    ids = [str(image) for image in data["image_ids"]]
    said = [data["tokenized_hypothesis"][i][0] for i in ids]
    truth = [data["tokenized_references"][i] for i in ids]
    hypotheses, references = [s.split() for s in said], [[t.split() for t in texts] for texts in truth]
    totals = caption_metrics.caption_scores(hypotheses, references)
    for name in EXTRAS:
        if name in data["scores"]:
            reason = unavailable(name) or ("" if os.environ.get(SLOW) else f"takes most of a minute; set {SLOW}=1")
            if reason:
                yield Skipped(f"{name} ({reason})")
            else:
                totals[name] = extra_score(name, said, truth)
    for name, expected in data["scores"].items():
        if name in totals:
            yield Comparison(name, abs(totals[name] - expected), TOLERANCE)
    each = _each(hypotheses, references)
    for name in each.keys() & data.get("per_image", {}).keys():
        pairs = zip(each[name], data["per_image"][name], strict=True)
        yield Comparison(f"per_image.{name}", max(abs(a - b) for a, b in pairs), TOLERANCE)
    yield from _tokens(data, ids, hypotheses, references)


def _each(hypotheses: list[list[str]], references: list[list[list[str]]]) -> dict[str, list[float]]:
    _, bleu = caption_metrics.bleu(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return {
        **{f"Bleu_{n + 1}": [scores[n] for scores in bleu] for n in range(caption_metrics.ORDERS)},
        "ROUGE_L": [caption_metrics.rouge_l(h, r) for h, r in pairs],
        "CIDEr": caption_metrics.cider(hypotheses, references)[1],
    }


def _tokens(
    data: dict[str, Any], ids: list[str], hypotheses: list[list[str]], references: list[list[list[str]]]
) -> Iterator[Comparison | Skipped]:
    if "hypothesis" not in data or "references" not in data:
        return
    raw = [caption for i in ids for caption in (data["hypothesis"][i], *data["references"][i])]
    expected = [words for said, texts in zip(hypotheses, references, strict=True) for words in (said, *texts)]
    try:
        yield exact("tokens", tokenise(raw, "ptb"), expected)
    except UsageError as error:
        yield Skipped(f"tokens ({error})")
