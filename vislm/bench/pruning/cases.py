"""What is measured: methods at budgets, the untouched model, and plain prompts of the same lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vislm import registry
from vislm.bench.pruning.model import Subject
from vislm.errors import UnknownName, UsageError
from vislm.lmm.interventions import Intervention
from vislm.lmm.run import Run
from vislm.lmm.session import attach

KEEPS = (0.5, 0.25, 0.1)
SPECS: dict[str, Callable[[float], str]] = {
    "divprune": "divprune:keep={}".format,
    "fastv": "fastv:keep={}".format,
    "flowcut": "flowcut:keep={}".format,
    "visionzip": "visionzip:keep={}".format,
    "pyramiddrop": lambda keep: f"pyramiddrop:ratios={keep}+{keep / 2}+{keep / 4}",
    "sparsevlm": "sparsevlm:keep={}".format,
}
"""Method -> its options at a budget. PyramidDrop keeps the budget behind its first stage, then half and a quarter of
it; SparseVLM's budget is its nominal one; the others' is what they leave."""


@dataclass(frozen=True)
class Measured:
    """One call: its record, and its wall time from pixels to the first word."""

    run: Run
    seconds: float


def method_at(name: str, keep: float) -> Intervention:
    """Return a method at a budget.

    Raises:
        UnknownName: a method that the benchmark does not know.
        UsageError: a budget that is no ratio.
    """
    if name not in SPECS:
        raise UnknownName("method of the pruning benchmark", name, SPECS)
    if not 0.0 < keep <= 1.0:
        raise UsageError(f"keep={keep}: expected a ratio in (0, 1]")
    return registry.build("pruning", SPECS[name](keep))


def call(subject: Subject, methods: Sequence[Intervention]) -> Measured:
    """Encode the image, prefill the prompt and make one word, in a session with these methods."""
    with attach(subject.model, *methods) as session:
        seconds = bare_seconds(subject)
    assert session.last_run is not None
    return Measured(session.last_run, seconds)


def bare_seconds(subject: Subject, **options: Any) -> float:
    """Return the wall time of the same call, in whatever session is open; options are those of ``generate``."""
    _finish(subject)
    started = time.perf_counter()
    with torch.no_grad():
        subject.model.generate(**subject.inputs, max_new_tokens=1, do_sample=False, **options)
    _finish(subject)
    return time.perf_counter() - started


def short_prompt_seconds(subject: Subject, columns: int) -> float:
    """Return the wall time of the language model alone on a prompt of so many words: what no pruning can beat."""
    ids = torch.full((1, columns), 5, device=subject.model.device)
    _finish(subject)
    started = time.perf_counter()
    with torch.no_grad():
        subject.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    _finish(subject)
    return time.perf_counter() - started


def _finish(subject: Subject) -> None:
    if subject.model.device.type != "cpu":
        torch.accelerator.synchronize()
