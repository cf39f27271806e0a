"""Question-answering and caption benchmarks for LMMs, by name: each is a module here with ``load(path, *, ...)``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from vislm.errors import UnknownName, UsageError
from vislm.eval.protocol import Benchmark
from vislm.registry import parse_value

LMM_BENCHMARKS = {
    "amber": "AMBER: yes/no questions about existence, attributes, relations; hallucination in descriptions",
    "coco_captions": "COCO captions, Karpathy splits: BLEU, ROUGE-L, CIDEr-D; METEOR, SPICE if installed",
    "gqa": "GQA: compositional questions, one-word answers",
    "mmbench": "MMBench: multiple choice in all rotations of the options",
    "mme": "MME: paired yes/no questions, ten tasks of perception and four of cognition",
    "pope": "POPE: yes/no questions about present and absent objects, three splits",
    "scienceqa": "ScienceQA-IMG: multiple-choice questions of school science with a picture",
    "textvqa": "TextVQA: questions about text in the picture",
    "vizwiz": "VizWiz: blind people's questions about their photographs",
    "vqav2": "VQAv2: open questions about COCO pictures",
}
"""Name -> one line."""
_ELSEWHERE = {"pope": "pope_variants"}
"""Name -> module, where they differ."""


def _module(name: str) -> ModuleType:
    if name not in LMM_BENCHMARKS:
        raise UnknownName("LMM benchmark", name, LMM_BENCHMARKS)
    return import_module(f"vislm.eval.{_ELSEWHERE.get(name, name)}")


def loader(name: str) -> Callable[..., Benchmark]:
    """Return the function that reads a benchmark's folder.

    Raises:
        UnknownName: no such benchmark.
    """
    return _module(name).load


def options(name: str) -> dict[str, Any]:
    """Return option -> default of a benchmark's reader."""
    parameters = inspect.signature(loader(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "control"}


def load(name: str, path: str | Path, **chosen: Any) -> Benchmark:
    """Read a benchmark's folder in the data set's official layout.

    Args:
        name: one of ``LMM_BENCHMARKS``.
        path: the folder.
        chosen: options of the benchmark's reader, e.g. ``split="val"``, ``suffix="none"``; and ``control``.

    Raises:
        UnknownName: no such benchmark or option.
        AnnotationError: files that are missing or broken as a whole; broken rows are in the benchmark's ``faults``.
    """
    for key in chosen:
        if key != "control" and key not in options(name):
            raise UnknownName(f"option of {name}", key, options(name))
    return loader(name)(Path(path), **chosen)


def read_options(name: str, text: str) -> dict[str, Any]:
    """Return the options of ``option=value,...`` as ``load`` takes them.

    Raises:
        UnknownName: no such option.
        UsageError: a pair without "=", a value of the wrong type, or an option that only Python code can give.
    """
    hints = typing.get_type_hints(loader(name))
    chosen: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"{pair!r} is not of the form option=value")
        if option not in options(name):
            raise UnknownName(f"option of {name}", option, options(name))
        if not any(part in (str, bool, int, float) for part in (hints[option], *typing.get_args(hints[option]))):
            raise UsageError(f"{name}: {option} can only be given in Python")
        chosen[option] = parse_value(value, hints[option], f"{name}: {option}")
    return chosen


def suspicions(name: str, benchmark: Benchmark) -> list[str]:
    """Return what is no fault of a folder but differs from what was published, one line each."""
    find = getattr(_module(name), "suspicions", None)
    return find(benchmark) if find else []
