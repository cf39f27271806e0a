"""What one run did, as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vislm.report.units import bytes_text, flops_text, milliseconds_text, percent_text, spans_text

if TYPE_CHECKING:
    from vislm.lmm.run import Run


def run_lines(run: Run, full: Run | None = None) -> list[str]:
    """Return one line per aspect: visual tokens, tower, decoder, FLOPs, key-value cache, memory, times, saving, heads.

    FLOPs come from the cost model, bytes and times are measured. Aspects that the run did not touch have no line.

    Args:
        run: of any session.
        full: the same prompt without pruning, to compare with.
    """
    facts = [
        ("visual tokens", _visual(run)),
        ("tower", spans_text(run.tower_tokens) if run.tower_tokens else ""),
        ("decoder", spans_text(run.layer_tokens) if run.layer_tokens else ""),
        ("FLOPs", _flops(run)),
        ("KV cache", _cache(run, full)),
        ("peak memory", _memory(run, full)),
        ("time", _seconds(run)),
        ("full run", "" if full is None else _seconds(full)),
        ("saving", "" if full is None else _saving(run, full)),
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


def _cache(run: Run, full: Run | None) -> str:
    if not run.kv_bytes:
        return ""
    counted = "as counted" if run.kv_bytes == run.kv_bytes_expected else f"counted {bytes_text(run.kv_bytes_expected)}"
    whole = "" if full is None else f" of {bytes_text(full.kv_bytes)}"
    return f"{bytes_text(run.kv_bytes)}{whole}" + (f" ({counted})" if run.kv_bytes_expected else "")


def _memory(run: Run, full: Run | None) -> str:
    if run.peak_bytes is None:
        return ""
    whole = "" if full is None or full.peak_bytes is None else f" of {bytes_text(full.peak_bytes)}"
    return f"{bytes_text(run.peak_bytes)}{whole}, beside the weights"


def _saving(run: Run, full: Run) -> str:
    """Say what part of the FLOPs went, and how much of that shows in the time; a ratio of small times is noisy."""
    everything, prefill = run.realised_saving(full), run.realised_saving(full, ("prefill",))
    if everything is None:
        return "no FLOPs saved"
    spent = run.flops["tower"] + run.flops["prefill"]
    saved = 1.0 - spent / (full.flops["tower"] + full.flops["prefill"])
    parts = [f"{percent_text(saved)} of the FLOPs, of which {percent_text(everything)} realised until the first word"]
    if prefill is not None:
        parts.append(f"{percent_text(prefill)} in the prefill alone")
    if run.seconds["scoring"]:
        whole = sum(full.seconds[phase] for phase in ("tower", "prompt", "prefill"))
        parts.append(f"scoring took {percent_text(run.seconds['scoring'] / whole)} of the full run's time")
    return ", ".join(parts)


def _seconds(run: Run) -> str:
    phases = [phase for phase in ("tower", "prompt", "prefill") if run.seconds.get(phase)]
    parts = [f"{phase} {milliseconds_text(run.seconds[phase])}" for phase in phases]
    if run.new_tokens:
        steps = "1 step" if run.new_tokens == 1 else f"{run.new_tokens} steps"
        parts.append(f"decode {milliseconds_text(run.seconds['decode'])} ({steps})")
    if run.seconds.get("scoring"):
        parts.append(f"scoring among them {milliseconds_text(run.seconds['scoring'])}")
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
