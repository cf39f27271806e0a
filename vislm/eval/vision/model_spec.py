"""What ``--model`` says about a vision model: ``NAME[@WEIGHTS][:option=value,...]``.

NAME is an architecture of the library (timm, open_clip, vislm) or a folder with the library's configuration and
weights. WEIGHTS is a safetensors file, ``random`` (seed 0, to try a pipeline out), or what names the library's own
weights, which may have to be downloaded: ``pretrained`` for timm, a tag for open_clip. Options change preprocessing or
architecture: ``tf_efficientnet_lite0@lite0.safetensors:mean=0.5,std=0.5,crop_pct=0.875``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vislm.errors import CheckpointError, UnknownName, UsageError
from vislm.files import sha256
from vislm.lmm.loading import EMBEDDED
from vislm.registry import parse_value

RANDOM = "random"
SUFFIX = ".safetensors"
_OPTIONS = re.compile(r":(?=[A-Za-z_]+=)")


@dataclass(frozen=True)
class ModelSpec:
    """A model as it was asked for."""

    name: str
    """Architecture, or a folder."""
    weights: str
    """A safetensors file, ``random``, a library's word for its own weights; empty for a folder."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The weights, where they are a file."""
        return Path(self.weights) if self.weights.endswith(SUFFIX) else None

    @property
    def is_folder(self) -> bool:
        """Whether the name is a folder."""
        return not self.weights and Path(self.name).is_dir()


def read_spec(text: str, options: Mapping[str, Any], library_weights: str) -> ModelSpec:
    """Take apart what was written on the command line.

    Args:
        text: ``NAME[@WEIGHTS][:option=value,...]``.
        options: option -> type, of what the kind of model takes.
        library_weights: how the library's own weights are written, for messages.

    Raises:
        UnknownName: no such option.
        UsageError: no weights are named, or an option's value is of the wrong type.
        CheckpointError: the file does not exist, or is no safetensors file.
    """
    if text in EMBEDDED:
        raise UsageError(
            f"{text} is a language model that sees; this benchmark evaluates a vision model: --model NAME@WEIGHTS"
        )
    model, *rest = _OPTIONS.split(text, maxsplit=1)
    chosen: dict[str, Any] = {}
    for pair in filter(None, ",".join(rest).split(",")):
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"--model {text!r}: {pair!r} is not of the form option=value")
        if option not in options:
            raise UnknownName("model option", option, options)
        chosen[option] = parse_value(value, options[option], option)
    name, at, weights = (model, "", "") if Path(model).is_dir() else model.rpartition("@")
    if not at:
        name = model
        if not Path(name).is_dir() and not name.startswith("hf-hub:"):
            raise UsageError(
                f"--model {text!r} names no weights: write {name}@FILE{SUFFIX}, {name}@{library_weights} (may download "
                f"them), or {name}@{RANDOM} to try the pipeline out"
            )
    spec = ModelSpec(name, weights, chosen)
    if spec.file is not None and not spec.file.is_file():
        raise CheckpointError(f"no such file: {spec.file}")
    if spec.file is None and Path(weights).is_file():
        raise CheckpointError(f"{weights} is no {SUFFIX} file; others can run code when they are read: convert it once")
    return spec


def weights_digest(spec: ModelSpec, model: nn.Module) -> str:
    """Return 16 digits of the SHA-256 of the weights: of the file's bytes, or without a file of the model's tensors."""
    if spec.file is not None:
        return sha256(spec.file)[:16]
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
