"""What a plan will cost, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.lmm.adapters import Adapter
from vislm.lmm.cost.expectation import Expectation
from vislm.lmm.cost.roofline import A100, decode_bytes, first_token_seconds
from vislm.report.tables import text_table
from vislm.report.units import bytes_text, flops_text, milliseconds_text, percent_text, spans_text

_PHASES = {"tower": "vision tower", "projector": "projector", "prefill": "prefill", "decode": "one decode step"}


def expectation_lines(adapter: Adapter, full: Expectation, pruned: Expectation) -> Iterator[str]:
    """Yield tokens per layer, a table of FLOPs and bytes, the theoretical saving, and what it leaves out.

    Args:
        adapter: of the model.
        full: the untouched model's costs.
        pruned: those under the methods.
    """
    yield f"tower: patches  {spans_text(pruned.tower_tokens)}"
    yield f"decoder: visual {spans_text(pruned.visual_tokens)}, {pruned.average_tokens:.1f} on average"
    yield f"decoder: all    {spans_text(pruned.columns)} (with {pruned.text_tokens} of text)"
    yield ""
    yield text_table(list(_rows(full, pruned)), ["", "untouched", "pruned", "left"])
    yield ""
    yield (
        f"theoretical saving until the first word: {percent_text(pruned.saving(full))} of the FLOPs, "
        f"a speed-up of {full.total_flops / pruned.total_flops:.2f}x if computing were all"
    )
    yield from _roofline_lines(adapter, full, pruned)
    for assumption in pruned.assumptions:
        yield f"estimate, not exact: {assumption}"


def _rows(full: Expectation, pruned: Expectation) -> Iterator[dict[str, str]]:
    for phase, name in _PHASES.items():
        yield _row(
            name, flops_text(full.flops[phase]), flops_text(pruned.flops[phase]), full.flops[phase], pruned.flops[phase]
        )
    total, left = full.total_flops, pruned.total_flops
    yield _row("until the first word", flops_text(total), flops_text(left), total, left)
    yield _row(
        "key-value cache", bytes_text(full.kv_bytes), bytes_text(pruned.kv_bytes), full.kv_bytes, pruned.kv_bytes
    )


def _row(name: str, full: str, pruned: str, before: float, after: float) -> dict[str, str]:
    return {"": name, "untouched": full, "pruned": pruned, "left": percent_text(after / before)}


def _roofline_lines(adapter: Adapter, full: Expectation, pruned: Expectation) -> Iterator[str]:
    before, after = (first_token_seconds(adapter, cost) for cost in (full, pruned))
    yield (
        f"roofline of an {A100.name}: {milliseconds_text(before)} -> {milliseconds_text(after)}, at most "
        f"{before / after:.2f}x: a layer takes the longer of computing and reading its weights; launches and eager "
        "attention come on top"
    )
    read, less = (decode_bytes(adapter, cost) for cost in (full, pruned))
    yield (
        f"decoding reads the weights for every word: {bytes_text(read)} -> {bytes_text(less)} a step at batch 1, "
        f"{percent_text(1 - less / read)} less; it gains with large batches and long contexts"
    )
