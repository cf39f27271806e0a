"""Models of timm and vislm's own backbones, with the preprocessing that their weights were trained for.

Source: Wightman, PyTorch Image Models, github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vislm.backbones.factory import create_model
from vislm.backbones.variants import list_models, variant
from vislm.backbones.weights import load_file
from vislm.errors import CheckpointError, UnknownName, UsageError, VislmError
from vislm.eval.vision.cost import PictureCost, patches_of
from vislm.eval.vision.folder_identity import settings_identity, timm_identity
from vislm.eval.vision.methods import reduced
from vislm.eval.vision.model_spec import RANDOM, ModelSpec, read_spec, weights_digest
from vislm.token_pruning.tome import Merging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREPROCESSING: dict[str, Any] = {
    "img_size": int,
    "crop_pct": float,
    "crop_mode": str,
    "interpolation": str,
    "mean": tuple[float, ...],
    "std": tuple[float, ...],
    "test_size": bool,
}
"""Model option -> type: in place of the weights' data configuration. ``test_size``: timm's larger size for tests."""
ARCHITECTURE: dict[str, Any] = {
    "num_classes": int,
    "global_pool": str,
    "patch_size": int,
    "embed_dim": int,
    "depth": int,
    "num_heads": int,
}
"""Model option -> type: arguments of timm's and vislm's models."""
_WORDS = {
    "crop_mode": ("center", "squash", "border"),
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
}
_LIBRARY = "pretrained"


@dataclass(frozen=True)
class TimmModel:
    """A model in evaluation mode and how it is shown pictures."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    device: str
    dtype: torch.dtype
    identity: dict[str, Any]
    interventions: Sequence[str]
    merging: Merging | None
    cost: PictureCost

    def pixels(self, batch: Sequence[Any]) -> Tensor:
        """Return the pictures of samples as the model takes them, ``(B, 3, H, W)`` on its device.

        Raises:
            UsageError: a sample without exactly one picture.
        """
        for asked in batch:
            if len(asked.images) != 1:
                raise UsageError(f"sample {asked.sample.id} has {len(asked.images)} pictures; expected one")
        return torch.stack([self.transform(asked.images[0]) for asked in batch]).to(self.device, self.dtype)

    def run(self, forward: Callable[[Tensor], Tensor], batch: Sequence[Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return what ``forward`` makes of a batch, float32 on the CPU, and each row's "seconds", FLOPs and tokens.

        "seconds" are the forward's alone, without decoding and preprocessing of pictures.

        Raises:
            VislmError: the device's memory does not suffice, or an output is not finite.
        """
        with torch.inference_mode(), enough_memory(len(batch)):
            pixels = self.pixels(batch)
            started = time.perf_counter()
            out = forward(pixels).float().cpu()
            seconds = (time.perf_counter() - started) / len(batch)
            cost = self.cost.of(forward, pixels)
        if not out.isfinite().all():
            raise VislmError("the model's outputs are not finite: wrong weights, or too narrow a --dtype")
        return out, {"seconds": seconds, **cost}

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the outputs, flat: weights, preprocessing, dtype, methods, package versions."""
        return {
            **self.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "interventions": list(self.interventions),
        }


@contextlib.contextmanager
def enough_memory(batch: int) -> Iterator[None]:
    """Turn a device's lack of memory into advice."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise VislmError(
            f"out of memory with a batch of {batch} pictures: use a smaller --batch-size; finished pictures are kept"
        ) from error


@contextlib.contextmanager
def timm_model(
    model: str,
    prune: Sequence[str] = (),
    heads: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    extra: Sequence[str] = (),
) -> Iterator[TimmModel]:
    """Load a model of timm or vislm; tokens are merged in it while the context is open.

    Args:
        model: ``NAME@FILE.safetensors``, ``NAME@pretrained`` (timm's, may download), ``NAME@random``, a folder that
            timm wrote, or ``hf-hub:OWNER/NAME``, with options; see ``model_spec``. NAME: of timm, of
            ``vislm list backbones``, or a YAML file of the same form.
        prune: nothing, or ``tome:...``.
        heads: nothing.
        dtype: float32 (default), bfloat16 or float16.
        device: cpu, cuda, ...
        extra: options that concern the caller and not the model.

    Raises:
        UnknownName: no such model, option or dtype.
        UsageError: no weights are named, options or methods that do not fit.
        CheckpointError: weights that do not fit or cannot be had.
    """
    spec = read_spec(model, {**PREPROCESSING, **ARCHITECTURE, **dict.fromkeys(extra, str)}, _LIBRARY)
    if (dtype or "float32") not in DTYPES:
        raise UnknownName("dtype", str(dtype), DTYPES)
    width = DTYPES[dtype or "float32"]
    made, shown = _made(spec)
    config = _data_config(spec, made, shown)
    identity = {
        **_architecture(spec, made),
        "weights": spec.weights if spec.weights == RANDOM else weights_digest(spec, made),
        **{f"architecture.{k}": spec.options[k] for k in ARCHITECTURE if k in spec.options},
        **{f"preprocessing.{k}": list(v) if isinstance(v, tuple) else v for k, v in sorted(config.items())},
        **{k: spec.options[k] for k in extra if k in spec.options},
        "timm": version("timm"),
        "torchvision": version("torchvision"),
    }
    made = made.eval().requires_grad_(False).to(device, width)
    patches = patches_of(made)
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(**config, is_training=False)
    with reduced(made, prune, heads, patches) as (merging, methods):
        yield TimmModel(made, transform, device, width, identity, methods, merging, PictureCost(patches, merging))


def _architecture(spec: ModelSpec, model: nn.Module) -> dict[str, Any]:
    """Return the name of the architecture, and for one from a file or folder its settings, never a path."""
    if spec.is_folder:
        return timm_identity(Path(spec.name), model)
    if _is_file(spec):
        return settings_identity(variant(spec.name).config, model)
    return {"model": spec.name}


def _is_file(spec: ModelSpec) -> bool:
    return spec.name.endswith((".yaml", ".yml"))


def _made(spec: ModelSpec) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with its weights, and for models of vislm what they are shown."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if spec.name in list_models() or _is_file(spec):
            return _ours(spec)
        model = _timm(spec)
    if spec.file is not None:
        load_file(model, spec.file)
    return model, {}


def _ours(spec: ModelSpec) -> tuple[nn.Module, dict[str, Any]]:
    if spec.weights == _LIBRARY:
        raise UsageError(f"{spec.name} has no weights to download; convert the authors' and give {spec.name}@FILE")
    model = create_model(spec.name, weights=spec.file, **_given(spec, ARCHITECTURE))
    published = variant(spec.name).published
    size = (3, published.input_size, published.input_size)
    shown = {"input_size": size, "crop_pct": published.crop_pct, "interpolation": published.interpolation}
    return model, shown


def _timm(spec: ModelSpec) -> nn.Module:
    import timm

    name = f"local-dir:{spec.name}" if spec.is_folder else spec.name
    if ":" not in name and not timm.is_model(name):
        raise UnknownName("model", name, [*list_models(), *timm.list_models(pretrained=True), *timm.list_models()])
    if spec.file is None and spec.weights not in ("", RANDOM, _LIBRARY):
        raise UnknownName(f"weights of {spec.name}", spec.weights, (RANDOM, _LIBRARY), "Or a .safetensors file.")
    options = _given(spec, ARCHITECTURE)
    if "img_size" in spec.options and _has_fixed_size(name):
        options["img_size"] = spec.options["img_size"]
    try:
        return timm.create_model(name, pretrained=spec.weights in ("", _LIBRARY), **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise CheckpointError(f"timm cannot make {spec.name}: {error}") from error


def _has_fixed_size(name: str) -> bool:
    import timm

    return ":" in name or bool(timm.models.get_pretrained_cfg_value(name, "fixed_input_size"))


def _given(spec: ModelSpec, names: dict[str, Any]) -> dict[str, Any]:
    return {name: spec.options[name] for name in names if name in spec.options}


def _data_config(spec: ModelSpec, model: nn.Module, shown: dict[str, Any]) -> dict[str, Any]:
    """Return timm's data configuration: that of the weights, with the options in its place."""
    from timm.data.config import resolve_data_config

    for key, words in _WORDS.items():
        if spec.options.get(key, words[0]) not in words:
            raise UnknownName(key, spec.options[key], words)
    for key in ("mean", "std"):
        if len(spec.options.get(key, (0.0,))) not in (1, 3):
            raise UsageError(
                f"{key}: {len(spec.options[key])} numbers; expected one, or one for each colour: 0.5+0.5+0.5"
            )
    if spec.options.get("crop_pct", 1.0) <= 0 or spec.options.get("img_size", 1) < 1:
        raise UsageError(f"{spec.name}: crop_pct and img_size have to be positive")
    given = _given(spec, PREPROCESSING)
    test_size = given.pop("test_size", False)
    return resolve_data_config(given, pretrained_cfg=shown, model=model, use_test_size=test_size)
