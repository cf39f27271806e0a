"""Models of open_clip: image and text towers, their preprocessing and tokenizer, by name and local weights.

Source: Ilharco et al., OpenCLIP, github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vislm.errors import CheckpointError, UnknownName, UsageError
from vislm.eval.vision.cost import PictureCost, patches_of
from vislm.eval.vision.folder_identity import open_clip_identity
from vislm.eval.vision.methods import reduced
from vislm.eval.vision.model_spec import RANDOM, ModelSpec, read_spec, weights_digest

OPTIONS: dict[str, Any] = {
    "like": str,
    "mean": tuple[float, ...],
    "std": tuple[float, ...],
    "interpolation": str,
    "resize_mode": str,
    "image_size": int,
}
"""Model option -> type. ``like``: the tag whose preprocessing and activation the weights were trained with."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TRAINING = ("mean", "std", "interpolation", "resize_mode", "quick_gelu")


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model in evaluation mode; all features are normalised float32 on the CPU."""

    model: Any
    preprocess: Any
    tokenizer: Any
    device: str
    dtype: torch.dtype
    identity: dict[str, Any]
    """Name, weights and preprocessing, flat."""
    interventions: Sequence[str]
    cost: PictureCost

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pictures as the model takes them, ``(B, 3, H, W)`` on its device."""
        return torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the normalised embeddings ``(B, D)`` of prepared pictures."""
        return nn.functional.normalize(self.model.encode_image(pixels).float(), dim=-1).cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the normalised embeddings ``(B, D)`` of texts."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return nn.functional.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the features, flat."""
        return {
            **self.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "interventions": list(self.interventions),
        }


@contextlib.contextmanager
def open_clip_model(
    model: str, prune: Sequence[str] = (), heads: Sequence[str] = (), dtype: str | None = None, device: str = "cpu"
) -> Iterator[OpenClip]:
    """Load an open_clip model; tokens are merged in its image tower while the context is open.

    Args:
        model: ``ARCHITECTURE@FILE.safetensors``, ``ARCHITECTURE@TAG`` (may download), ``ARCHITECTURE@random``, a
            folder with open_clip_config.json, weights and tokenizer, or ``hf-hub:OWNER/NAME``; see ``model_spec`` for
            options.
        prune: nothing, or ``tome:...``.
        heads: nothing.
        dtype: float32 (default), bfloat16 or float16.
        device: cpu, cuda, ...

    Raises:
        UnknownName: no such architecture, tag, option or dtype.
        UsageError: no weights are named, or published weights of the architecture disagree on preprocessing or
            activation and ``like`` does not say which is meant; a method that does not fit.
        CheckpointError: weights that do not fit or cannot be had.
    """
    import open_clip

    spec = read_spec(model, OPTIONS, "TAG")
    if (dtype or "float32") not in PRECISIONS:
        raise UnknownName("dtype", str(dtype), PRECISIONS)
    precision = PRECISIONS[dtype or "float32"]
    source = _source(spec)
    tokenizer = _tokenizer(spec, source)
    made, preprocess = _made(spec, source, precision, device)
    made.eval().requires_grad_(False)
    identity = {
        **(open_clip_identity(Path(spec.name), made) if spec.is_folder else {"model": spec.name}),
        "weights": spec.weights if spec.weights == RANDOM else weights_digest(spec, made),
        **{f"preprocessing.{k}": v for k, v in sorted(open_clip.get_model_preprocess_cfg(made).items())},
        "quick_gelu": _uses_quick_gelu(made),
        "open_clip_torch": version("open_clip_torch"),
        "timm": version("timm"),
    }
    patches = patches_of(made)
    input_dtype = open_clip.get_input_dtype(precision) or torch.float32
    with reduced(made, prune, heads, patches) as (merging, methods):
        yield OpenClip(
            made, preprocess, tokenizer, device, input_dtype, identity, methods, PictureCost(patches, merging)
        )


def _source(spec: ModelSpec) -> str:
    """Return the name that open_clip knows, checked."""
    import open_clip

    if spec.is_folder:
        if "like" in spec.options:
            raise UsageError(f"{spec.name}: like= is for architectures; a folder states its own preprocessing")
        return f"local-dir:{spec.name}"
    if spec.name.startswith("hf-hub:"):
        return spec.name
    if spec.name not in open_clip.list_models():
        raise UnknownName("model of open_clip", spec.name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    for kind, tag in (("tag", "" if spec.file or spec.weights == RANDOM else spec.weights), ("tag", _like(spec))):
        if tag and tag not in tags:
            raise UnknownName(f"{kind} of {spec.name}", tag, tags, "Weights of your own: a .safetensors file.")
    return spec.name


def _like(spec: ModelSpec) -> str:
    return spec.options.get("like", "")


def _made(spec: ModelSpec, source: str, precision: str, device: str) -> tuple[Any, Any]:
    import open_clip
    from safetensors import SafetensorError

    training = _training(spec) if source == spec.name and ":" not in source else {}
    options = {k: spec.options.get(k, training.get(k)) for k in ("mean", "std", "interpolation", "resize_mode")}
    for key in ("mean", "std"):  # one number means all three channels
        if options[key] is not None and len(options[key]) == 1:
            options[key] = tuple(options[key]) * 3
    build = partial(
        open_clip.create_model_and_transforms,
        source,
        str(spec.file) if spec.file else None if spec.weights in ("", RANDOM) else spec.weights,
        precision=precision,
        device=device,
        force_quick_gelu=bool(training.get("quick_gelu")),
        force_image_size=spec.options.get("image_size"),
        pretrained_text=False,
        require_pretrained=spec.weights != RANDOM,
        **{f"image_{key}": value for key, value in options.items()},
    )
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, _, preprocess = build()
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"open_clip cannot make {spec.name} with {spec.weights or 'its weights'}: {error}"
        ) from error
    return model, preprocess


def _training(spec: ModelSpec) -> dict[str, Any]:
    """Return the preprocessing and activation that the weights were trained with, as the library publishes them."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    tag = _like(spec) or (spec.weights if spec.weights in tags else "")
    found = {t: {k: (open_clip.get_pretrained_cfg(spec.name, t) or {}).get(k) for k in _TRAINING} for t in tags}
    if tag:
        return found[tag]
    first = next(iter(found.values()), {})
    differing = [k for k in _TRAINING if any((f[k] or None) != (first[k] or None) for f in found.values())]
    if differing and spec.weights == RANDOM:
        return {k: v for k, v in first.items() if k not in differing}
    if differing:
        raise UsageError(
            f"weights of {spec.name} were trained with different {', '.join(differing)}; say what yours are like: "
            f"{spec.name}@{spec.weights}:like=TAG with one of {', '.join(tags)}"
        )
    return first


def _uses_quick_gelu(model: nn.Module) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def _tokenizer(spec: ModelSpec, source: str) -> Any:
    import open_clip

    if (spec.file or spec.weights == RANDOM) and _downloads_tokenizer(spec.name):
        raise CheckpointError(
            f"the tokenizer of {spec.name} is no part of open_clip: give a folder with open_clip_config.json, weights "
            f"and the tokenizer's files as --model FOLDER, or {spec.name}@TAG, which may download it"
        )
    try:
        return open_clip.get_tokenizer(source)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise CheckpointError(f"open_clip cannot make the tokenizer of {spec.name}: {error}") from error


def _downloads_tokenizer(name: str) -> bool:
    import open_clip

    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    return bool(text.get("hf_tokenizer_name") or text.get("hf_model_name")) or "siglip" in name.lower()
