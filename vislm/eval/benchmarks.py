"""The catalogue of benchmarks: each name is a module with ``load(path, *, ...)``, imported when it is used."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from vislm.errors import UnknownName, UsageError
from vislm.eval.protocol import Benchmark, Control
from vislm.registry import parse_value

FOLDERS = {
    "questions": {
        "amber": "AMBER: yes/no questions about existence, attributes, relations; hallucination in descriptions",
        "gqa": "GQA: compositional questions, one-word answers",
        "mmbench": "MMBench: multiple choice in all rotations of the options",
        "mme": "MME: paired yes/no questions, ten tasks of perception and four of cognition",
        "pope": "POPE: yes/no questions about present and absent objects, three splits",
        "scienceqa": "ScienceQA-IMG: multiple-choice questions of school science with a picture",
        "textvqa": "TextVQA: questions about text in the picture",
        "vizwiz": "VizWiz: blind people's questions about their photographs",
        "vqav2": "VQAv2: open questions about COCO pictures",
    },
    "captions": {
        "chair": "CHAIR: hallucinated objects in captions",
        "coco_captions": "COCO captions, Karpathy splits: BLEU, ROUGE-L, CIDEr-D; METEOR, SPICE if installed",
    },
    "vision": {
        "ade20k": "ADE20K semantic segmentation: mean IoU",
        "coco_detection": "COCO detection and instance segmentation: box and mask AP",
        "imagenet": "ImageNet-1k, V2, ReaL, A, R, Sketch: top-1 and top-5",
        "knn": "k nearest neighbours on frozen features",
        "retrieval": "image-text retrieval, COCO and Flickr30k Karpathy splits: recall at 1, 5, 10",
        "zero_shot": "zero-shot classification with open_clip's class names and templates",
    },
}
"""Folder of ``vislm.eval`` -> name of a benchmark, which is a module there, -> one line about it."""
LMM_BENCHMARKS = {**FOLDERS["questions"], **FOLDERS["captions"]}
"""Those that a large multimodal model answers."""
VISION_BENCHMARKS = FOLDERS["vision"]
"""Those of vision models."""
BENCHMARKS = dict(sorted({**LMM_BENCHMARKS, **VISION_BENCHMARKS}.items()))
"""All of them."""


def load_benchmark(name: str, path: str | Path, *, control: Control = "none", **chosen: Any) -> Benchmark:
    """Read a benchmark's folder in the data set's official layout.

    Args:
        name: one of ``BENCHMARKS``.
        path: the folder.
        control: "grey" replaces every picture.
        chosen: options of the benchmark's reader, e.g. ``split="val"``, ``suffix="none"``.

    Raises:
        UnknownName: no such benchmark or option.
        AnnotationError: files that are missing or broken as a whole; broken rows are in the benchmark's ``faults``.
    """
    for option in chosen:
        _check_option(name, option)
    return _loader(name)(Path(path), control=control, **chosen)


def options(name: str) -> dict[str, Any]:
    """Return option -> default of a benchmark's reader.

    Raises:
        UnknownName: no such benchmark.
    """
    parameters = inspect.signature(_loader(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "control"}


def read_options(name: str, text: str) -> dict[str, Any]:
    """Return the options of ``option=value,...`` as :func:`load_benchmark` takes them.

    Raises:
        UnknownName: no such benchmark or option.
        UsageError: a pair without "=", a value of the wrong type, or an option that only Python code can give.
    """
    hints = typing.get_type_hints(_loader(name))
    chosen: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"{pair!r} is not of the form option=value")
        _check_option(name, option)
        if not any(part in (str, bool, int, float) for part in (hints[option], *typing.get_args(hints[option]))):
            raise UsageError(f"{name}: {option} can only be given in Python")
        chosen[option] = parse_value(value, hints[option], f"{name}: {option}")
    return chosen


def suspicions(name: str, benchmark: Benchmark) -> list[str]:
    """Return what is no fault of a folder but differs from what was published, one line each."""
    find = getattr(_module(name), "suspicions", None)
    return find(benchmark) if find else []


def _module(name: str) -> ModuleType:
    if name not in BENCHMARKS:
        raise UnknownName("benchmark", name, BENCHMARKS)
    folder = next(folder for folder, members in FOLDERS.items() if name in members)
    return import_module(f"vislm.eval.{folder}.{name}")


def _loader(name: str) -> Callable[..., Benchmark]:
    return _module(name).load


def _check_option(name: str, option: str) -> None:
    if option not in options(name):
        raise UnknownName(f"option of {name}", option, options(name))
