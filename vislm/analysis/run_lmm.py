"""Everything about the heads of an LMM's decoder in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from vislm.analysis import sinks
from vislm.analysis.lmm_knockout import EDGES, knockout_curves
from vislm.analysis.lmm_parts import (
    add_divergence,
    add_dormant,
    add_importance,
    add_lens,
    add_maps,
    add_massive,
    add_retrieval,
    add_rollout,
    add_sinks,
    add_visual,
)
from vislm.analysis.recorder import Recorder, recorded
from vislm.analysis.records import Sample
from vislm.analysis.results import Analysis
from vislm.analysis.sink_dims import find_sink_dims
from vislm.analysis.tower import add_tower
from vislm.analysis.what import chosen_parts
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.model import LMM, ImageSource

PARTS = (
    *("visual", "sinks", "dormant", "massive", "divergence", "retrieval", "rollout", "lens"),
    *("importance", "knockout", "tower", "maps"),
)
"""What can be asked of an LMM. "importance" takes L * H prefills, "knockout" four for every layer."""


def analyze_lmm(
    lmm: LMM,
    images: ImageSource | Sequence[ImageSource],
    question: str,
    *,
    what: str | Sequence[str] = "all",
    max_new_tokens: int = 32,
    box: tuple[float, float, float, float] | None = None,
    expected: str | None = None,
    edges: Sequence[str] = EDGES,
    window: int = 1,
    tau: float = 20.0,
    system: int = 0,
    rows: int = 8,
) -> Analysis:
    """Return the analysis of a model answering one question about images; head maps are means over the images.

    Methods that are in force (``lmm.using``) stay so: what is recorded of the last prompt row and of the answer's rows
    is the attention that they leave. Sums over all of the prompt's rows (sinks, dormant heads, flow) are of the layers'
    attention before any edit. With "all", parts that contradict a method are left out, and the header says why.

    Args:
        lmm: the model.
        images: pictures, each asked about alone.
        question: plain text.
        what: "all", or names of :data:`PARTS`, in a list or separated by commas.
        max_new_tokens: steps of the answer that are recorded.
        box: (left, top, right, bottom) of what the answer is about, fractions of the picture; for "retrieval".
        expected: word that a right answer contains; only right answers count for "retrieval". None: all do.
        edges: what "knockout" cuts, one curve each.
        window: layers that are cut together.
        tau: normalised activation above which a token is a sink.
        system: tokens behind the first that are a system prompt.
        rows: prompts per forward pass, for "importance".

    Raises:
        UsageError: an unknown part; "retrieval" asked for without a box.
        PlanConflict: a method in force contradicts a part that was asked for, or searches (opera).
    """
    parts = chosen_parts(what, PARTS)
    pictures = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
    if not pictures:
        raise UsageError("no image; give at least one")
    if box is None and "retrieval" in parts and what != "all":
        raise UsageError("retrieval needs box=(left, top, right, bottom) of what the answer is about, from 0 to 1")
    config = lmm.adapter.text_config
    depth = config.num_hidden_layers
    analysis = Analysis(
        {
            "kind": "lmm",
            "model": lmm.name,
            "family": lmm.adapter.family,
            "question": question,
            "images": len(pictures),
            "what": list(parts),
            "layers": depth,
            "heads": [config.num_attention_heads] * depth,
            "kv_heads": config.num_key_value_heads,
            "dtype": str(lmm.model.dtype).removeprefix("torch."),
            "interventions": lmm.fingerprint()["interventions"],
        }
    )
    dims: tuple[int, ...] = ()
    if {"visual", "sinks"} & set(parts):
        with _or_skipped(analysis, "sink_dims", asked=False):
            dims = find_sink_dims(lmm, pictures[0], question, tau)
    analysis.header["sink_dims"] = list(dims)
    recorder = Recorder(
        "last_rows",
        columns="dormant" in parts,
        divergence="divergence" in parts,
        sink_dims=dims,
        tau=tau,
        keep_calls="rollout" in parts,
        system=system,
    )
    samples = [_record(lmm, picture, question, recorder, max_new_tokens) for picture in pictures]
    _describe(analysis, lmm, samples)
    if "visual" in parts:
        add_visual(analysis, samples)
    if "sinks" in parts:
        add_sinks(analysis, samples)
    if "dormant" in parts:
        add_dormant(analysis, samples)
    if "divergence" in parts:
        add_divergence(analysis, samples)
    if "retrieval" in parts:
        add_retrieval(analysis, samples, box, expected)
    if "rollout" in parts:
        add_rollout(analysis, samples[0])
    more = {
        "massive": lambda: add_massive(analysis, lmm, pictures, question),
        "lens": lambda: add_lens(analysis, lmm, pictures[0], question),
        "importance": lambda: add_importance(analysis, lmm, pictures, question, rows),
        "knockout": lambda: _add_knockout(analysis, lmm, pictures, question, edges, window),
    }
    for part, add in more.items():
        if part in parts:
            with _or_skipped(analysis, part, asked=what != "all"):
                add()
    if "tower" in parts:
        add_tower(analysis, lmm, pictures)
    if "maps" in parts:
        add_maps(analysis, samples[0])
    return analysis


@contextlib.contextmanager
def _or_skipped(analysis: Analysis, part: str, *, asked: bool) -> Iterator[None]:
    """Note in the header that a method in force contradicts a part, unless the part was asked for by name."""
    try:
        yield
    except PlanConflict as conflict:
        if asked:
            raise
        analysis.header.setdefault("skipped", {})[part] = str(conflict)


def _add_knockout(
    analysis: Analysis, lmm: LMM, images: Sequence[ImageSource], question: str, edges: Sequence[str], window: int
) -> None:
    curves = knockout_curves(lmm, images, question, edges, window)
    note = "(edges, L): change of the answer's first token's probability, percent, layers cut around each"
    title = "Attention knockout: change of the answer's probability"
    analysis.curves("knockout.change", curves, title, note, list(edges), "%")


def _record(lmm: LMM, image: ImageSource, question: str, recorder: Recorder, max_new_tokens: int) -> Sample:
    inputs = lmm.prepare([image], [question])
    with lmm.using(recorder) as running, torch.no_grad():
        session: Any = running._session
        session.questions = [question]
        out = lmm.model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
        run = session.last_run
    new = out[0, inputs["input_ids"].shape[1] :]
    tokenizer = lmm.processor.tokenizer
    answer = tokenizer.decode(new, skip_special_tokens=True).strip()
    recording = recorded(run)
    tokens = [tokenizer.decode([token]) for token in new.tolist()]
    grids = lmm.adapter.grids(run.features[0], run.spans[0]) if run.features else []
    visual = run.visual_tokens[0] if run.visual_tokens else 0
    return Sample(image, answer, tokens[: len(recording.steps)], recording, grids, visual)


def _describe(analysis: Analysis, lmm: LMM, samples: Sequence[Sample]) -> None:
    first = samples[0]
    analysis.header |= {
        "answers": [sample.answer for sample in samples],
        "tokens": first.tokens,
        "steps": len(first.recording.steps),
        "key_groups": list(first.recording.key_groups),
        "query_groups": list(first.recording.query_groups),
        "grids": [
            {"rows": g.height, "columns": g.width, "start": g.start, "row_stride": g.row_stride} for g in first.grids
        ],
        "sink_epsilon": sinks.EPSILON,
    }
