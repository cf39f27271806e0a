"""Models of semantic segmentation as subjects: a folder of transformers, or a folder of finished maps."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vislm.errors import CheckpointError, ImageError, UsageError
from vislm.eval.protocol import Asked, Subject
from vislm.eval.vision.label_maps import packed_map, read_map
from vislm.eval.vision.segmentation_models import segmentation_model
from vislm.eval.vision.sliding import Windows
from vislm.files import sha256

CONFIG = "config.json"


@contextlib.contextmanager
def open_segmenter(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[Subject]:
    """Open a model of semantic segmentation.

    Args:
        model: a folder of transformers (config.json, preprocessor_config.json, safetensors weights), with options as in
            ``segmentation_model``; or a folder of PNG files with classes from 0, named like the samples.
        prune: nothing.
        heads: nothing.
        dtype: float32.
        device: cpu, cuda, ...

    Raises:
        UsageError: pruning or head methods, which act in language models, or another dtype.
        CheckpointError: a folder that holds neither, or weights that cannot be read.
    """
    if prune or heads:
        raise UsageError(f"{[*prune, *heads]} cannot act in a segmentation model; leave --prune and --heads out")
    if dtype not in (None, "float32"):
        raise UsageError(f"dtype {dtype}: segmentation models are evaluated in float32")
    folder = Path(model)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        yield StoredMaps(folder)
        return
    forward, prepare, windows, identity = segmentation_model(model, device)
    yield Segmenter(forward, prepare, identity, windows)


class Segmenter:
    """Classes by the largest logit, after the logits were brought to the picture's own size; one picture at a time.

    Args:
        forward: from pictures (1, 3, h, w) to logits (1, C, .., ..) of any resolution.
        prepare: from a picture to (1, 3, h, w): resizing and normalisation.
        identity: what determines the maps, flat.
        windows: how a prepared picture is cut; None: not at all.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        prepare: Callable[[Image.Image], Tensor],
        identity: dict[str, Any],
        windows: Windows | None = None,
    ) -> None:
        self._forward, self._prepare, self._identity = forward, prepare, identity
        self._windows = windows

    def fingerprint(self) -> dict[str, Any]:
        """Return weights, preprocessing and windows, flat."""
        windows = {} if self._windows is None else {f"windows.{k}": v for k, v in vars(self._windows).items()}
        return {**self._identity, **windows}

    @torch.inference_mode()
    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return each picture's "map": base64 of a PNG with classes from 0.

        Raises:
            UsageError: a sample without exactly one picture, or more classes than a map can hold.
        """
        return [self._row(asked) for asked in batch]

    def _row(self, asked: Asked) -> dict[str, Any]:
        image, began = _only_picture(asked), time.perf_counter()
        pixels = self._prepare(image)
        logits = self._forward(pixels) if self._windows is None else self._windows.logits(self._forward, pixels)
        if logits.shape[1] > 256:
            raise UsageError(f"the model has {logits.shape[1]} classes; a map holds at most 256")
        full = interpolate(logits.float(), (image.height, image.width), mode="bilinear", align_corners=False)
        classes = full.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        return {"text": "", "map": packed_map(classes), "seconds": time.perf_counter() - began}


class StoredMaps:
    """Finished maps, one PNG per sample, in place of the model that made them.

    Raises:
        CheckpointError: the folder holds no PNG files.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png")
        if not files:
            raise CheckpointError(f"{folder} holds neither {CONFIG} nor maps as .png files")
        self._files = {p.stem: p for p in files}

    def fingerprint(self) -> dict[str, Any]:
        """Return a digest of all files."""
        digest = hashlib.sha256("".join(f"{n} {sha256(p)}\n" for n, p in self._files.items()).encode())
        return {"model": "stored maps", "weights": digest.hexdigest()[:16]}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the map of each sample.

        Raises:
            CheckpointError: a sample without a sound map.
        """
        return [{"text": "", "map": self._map(asked), "seconds": 0.0} for asked in batch]

    def _map(self, asked: Asked) -> str:
        file = self._files.get(asked.sample.id)
        if file is None:
            raise CheckpointError(f"sample {asked.sample.id}: no map {asked.sample.id}.png")
        try:
            classes = read_map(file)
        except ImageError as error:
            raise CheckpointError(f"sample {asked.sample.id}: {error}") from error
        if classes.max() > 255:
            raise CheckpointError(f"{file} holds class {classes.max()}; expected 0 to 255")
        return packed_map(classes)


def _only_picture(asked: Asked) -> Image.Image:
    if len(asked.images) != 1:
        raise UsageError(f"sample {asked.sample.id} has {len(asked.images)} pictures; expected one")
    return asked.images[0]
