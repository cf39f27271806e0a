"""What one run did, as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vislm.report.units import bytes_text, flops_text, milliseconds_text, percent_text, spans_text

if TYPE_CHECKING:
    from vislm.lmm.run import Run


def run_lines(run: Run) -> list[str]:
    """Return one line per aspect: visual tokens, tower, decoder, FLOPs, key-value cache, times, heads.

    FLOPs come from the cost model, bytes and times are measured. Aspects that the run did not touch have no line.
    """
    facts = [
        ("visual tokens", _visual(run)),
        ("tower", spans_text(run.tower_tokens) if run.tower_tokens else ""),
        ("decoder", spans_text(run.layer_tokens) if run.layer_tokens else ""),
        ("FLOPs", _flops(run)),
        ("KV cache", bytes_text(run.kv_bytes) if run.kv_bytes else ""),
        ("time", _seconds(run)),
        ("heads", _heads(run)),
    ]
    return [f"{name:<14}{text}" for name, text in facts if text]


def _visual(run: Run) -> str:
    pairs = list(zip(run.visual_tokens, run.visual_tokens_kept, strict=True))
    if len(pairs) == 1:
        return f"{pairs[0][0]} -> {pairs[0][1]}"
    return ", ".join(f"image {number}: {before} -> {after}" for number, (before, after) in enumerate(pairs, start=1))


def _flops(run: Run) -> str:
    if not run.flops:
        return ""
    parts = [
        f"{phase} {flops_text(run.flops[phase])} of {flops_text(run.flops[f'full_{phase}'])}"
        for phase in ("tower", "prefill")
        if run.flops[f"full_{phase}"]
    ]
    full = run.flops["full_tower"] + run.flops["full_prefill"]
    share = (run.flops["tower"] + run.flops["prefill"]) / full if full else None
    return f"{', '.join(parts)} ({percent_text(share)} of the full run)"


def _seconds(run: Run) -> str:
    parts = [f"{phase} {milliseconds_text(run.seconds[phase])}" for phase in ("tower", "prefill") if run.seconds[phase]]
    if run.new_tokens:
        steps = "1 step" if run.new_tokens == 1 else f"{run.new_tokens} steps"
        parts.append(f"decode {milliseconds_text(run.seconds['decode'])} ({steps})")
    return ", ".join(parts)


def _heads(run: Run) -> str:
    """Say which heads are scaled; for a batch, in how many of its samples."""
    parts = []
    for layer, factors in sorted(run.head_factors.items()):
        scaled = (factors != 1.0).sum(0).tolist()
        names = [
            f"{head} (x{_factor(factors[:, head].tolist())}"
            + (")" if len(factors) == 1 else f", {count}/{len(factors)})")
            for head, count in enumerate(scaled)
            if count
        ]
        if names:
            parts.append(f"layer {layer}: {', '.join(names)}")
    if not parts:
        return "none scaled" if run.head_factors else ""
    return "; ".join(parts)


def _factor(factors: list[float]) -> str:
    changed = sorted({f"{factor:.3g}" for factor in factors if factor != 1.0}, key=float)
    return changed[0] if len(changed) == 1 else f"{changed[0]}-{changed[-1]}"
