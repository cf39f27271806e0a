"""Semantic segmentation models of transformers, from a local folder with safetensors weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vislm.errors import CheckpointError, UnknownName, UsageError
from vislm.eval.vision.model_spec import RANDOM, ModelSpec, read_spec, weights_digest
from vislm.eval.vision.sliding import Windows

OPTIONS: dict[str, Any] = {
    "resize": str,
    "size": int,
    "max_size": int,
    "mode": str,
    "crop": int,
    "stride": int,
}
"""Model option -> type."""
RESIZES = ("ratio", "processor", "none")
MODES = ("whole", "slide")
Opened = tuple[Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor], Windows | None, dict[str, Any]]


def segmentation_model(text: str, device: str) -> Opened:
    """Load a model; return its forward, its preprocessing, its windows and its identity.

    Args:
        text: ``FOLDER[:option=value,...]``; ``FOLDER@random`` takes only the configuration (seed 0).
            resize=ratio (default): the short side becomes ``size`` (512) unless the long one would exceed ``max_size``
            (2048); resize=processor: as the folder's image processor does, e.g. for models of one input size;
            resize=none. mode=whole (default), or slide: windows of ``crop`` (512) pixels every ``stride`` (341).
        device: cpu, cuda, ...

    Raises:
        UnknownName: no such option, way of resizing or mode.
        UsageError: no folder, or options that do nothing in the chosen mode.
        CheckpointError: a folder that transformers cannot read, or weights that are no safetensors file.
    """
    spec = read_spec(text, OPTIONS, RANDOM)
    if not Path(spec.name).is_dir():
        raise UsageError(f"--model {text!r}: expected a folder of transformers (config.json, model.safetensors)")
    if spec.weights not in ("", RANDOM):
        raise UsageError(f"--model {text!r}: weights lie in the folder; leave @{spec.weights} out")
    resize, mode = spec.options.get("resize", RESIZES[0]), spec.options.get("mode", MODES[0])
    for kind, value, known in (("resize", resize, RESIZES), ("mode", mode, MODES)):
        if value not in known:
            raise UnknownName(kind, value, known)
    for needs, keys, active in (
        ("resize=ratio", ("size", "max_size"), resize == "ratio"),
        ("mode=slide", ("crop", "stride"), mode == "slide"),
    ):
        if not active and any(key in spec.options for key in keys):
            raise UsageError(f"--model {text!r}: {' and '.join(keys)} go with {needs}")
    model, processor = _loaded(spec)
    model = model.eval().requires_grad_(False).to(device)
    shape = (spec.options.get("size", 512), spec.options.get("max_size", 2048))

    def prepare(image: Image.Image) -> Tensor:
        if resize == "ratio":
            image = image.resize(scaled(image.size, *shape), Image.Resampling.BILINEAR)
        keep = {} if resize == "processor" else {"do_resize": False}
        return processor(images=image, return_tensors="pt", **keep)["pixel_values"].to(device)

    def forward(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).logits

    windows = Windows(spec.options.get("crop", 512), spec.options.get("stride", 341)) if mode == "slide" else None
    sizes = {"size": shape[0], "max_size": shape[1]} if resize == "ratio" else {}
    identity = {
        "model": type(model).__name__,
        "weights": RANDOM if spec.weights == RANDOM else weights_digest(spec, model),
        "config": _digest(model.config.to_dict()),
        "preprocessing": _digest(processor.to_dict()),
        "resize": resize,
        **sizes,
        "transformers": version("transformers"),
    }
    return forward, prepare, windows, identity


def scaled(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Return width and height whose shorter side is ``short``, or whose longer one is ``long`` if that is less."""
    ratio = min(short / min(size), long / max(size))
    width, height = (max(1, int(side * ratio + 0.5)) for side in size)
    return width, height


def _loaded(spec: ModelSpec) -> tuple[Any, Any]:
    import transformers
    from safetensors import SafetensorError

    auto = transformers.AutoModelForSemanticSegmentation
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(spec.name, local_files_only=True)
        if spec.weights != RANDOM:
            return auto.from_pretrained(
                spec.name, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ), processor
        config = transformers.AutoConfig.from_pretrained(spec.name, local_files_only=True)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return auto.from_config(config), processor
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot read a segmentation model from {spec.name}: {error}") from error


def _digest(settings: dict[str, Any]) -> str:
    """Return 16 digits that change with the settings; paths and versions in them do not count."""
    own = ("transformers_version", "name_or_path")
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k not in own}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
