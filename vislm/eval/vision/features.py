"""Frozen vision models as subjects: normalised features of pictures, and the votes of their nearest neighbours."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vislm.errors import RunFolderError, UnknownName, UsageError
from vislm.eval.protocol import Asked
from vislm.eval.running.store import RESULTS, ROWS, RUN, differing, read_json
from vislm.eval.vision.knn import FeatureSample, QuerySample, Votes
from vislm.eval.vision.knn_vote import knn_votes
from vislm.eval.vision.timm_model import TimmModel, timm_model

POOLS = {
    "head": "what the model's own head reads",
    "cls": "the class token",
    "avg": "the mean of the patches, or of the last map",
}
"""Model option ``pool`` -> what the features are."""
_TOP = 5


@contextlib.contextmanager
def open_features(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[Features]:
    """Load a model as an embedder: options as for :func:`vislm.eval.vision.timm_model.timm_model`, and ``pool``.

    Raises:
        UnknownName: no such pool, and what ``timm_model`` raises.
    """
    with timm_model(model, prune, heads, dtype, device, extra=("pool",)) as loaded:
        pool = loaded.identity.setdefault("pool", "head")
        if pool not in POOLS:
            raise UnknownName("pool", pool, POOLS)
        yield Features(loaded, pool)


class Features:
    """Embeds pictures; for a picture with neighbours it gives their votes instead."""

    def __init__(self, loaded: TimmModel, pool: str) -> None:
        self._loaded, self._pool = loaded, pool
        self._bank: tuple[Votes, Tensor, Tensor] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's own fingerprint with the pooling."""
        return self._loaded.fingerprint()

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the features ``(B, D)`` of prepared pictures ``(B, 3, H, W)``.

        Raises:
            UsageError: a class token is asked of a model without one.
        """
        model = self._loaded.model
        if self._pool == "head":
            return model.forward_head(model.forward_features(pixels), pre_logits=True)
        tokens = model.forward_features(pixels)
        prefix = getattr(model, "num_prefix_tokens", 0)
        if tokens.dim() == 3:
            if self._pool == "cls" and prefix:
                return tokens[:, 0]
            merging = self._loaded.merging
            if self._pool == "avg":
                whole = tokens if merging is None else merging.unmerge(tokens)
                return whole[:, prefix:].mean(1)
        elif self._pool == "avg" and tokens.dim() == 4:
            last = getattr(model, "output_fmt", "NCHW") == "NHWC" or tokens.shape[-1] == model.num_features
            return tokens.mean((1, 2) if last else (2, 3))
        raise UsageError(f"pool={self._pool}: {type(model).__name__} has no class token; use pool=avg or pool=head")

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the rows of a batch: "features", normalised, or "votes" and "text" for pictures with neighbours.

        Raises:
            UsageError: samples of another kind; training features of another model.
            VislmError: the device's memory does not suffice, or a feature is not finite.
        """
        features, cost = self._loaded.run(self.embed, batch)
        features = nn.functional.normalize(features, dim=-1)
        rows: list[dict[str, Any]] = [{} for _ in batch]
        asked: dict[Votes, list[int]] = {}
        for place, sample in enumerate(a.sample for a in batch):
            if isinstance(sample, FeatureSample):
                written = encode(features[place].numpy(), sample.store)
                rows[place] = {"text": "", "features": written, "store": sample.store, **cost}
            elif isinstance(sample, QuerySample):
                asked.setdefault(sample.votes, []).append(place)
            else:
                raise UsageError(f"sample {sample.id} is nothing to embed; this model needs a benchmark such as knn")
        for votes, places in asked.items():
            for place, named in zip(places, self._votes(features[places], votes), strict=True):
                rows[place] = {"text": named[str(votes.k)][0], "votes": named, **cost}
        return rows

    def _votes(self, features: Tensor, votes: Votes) -> list[dict[str, list[str]]]:
        """Return for each feature k -> classes, most votes first."""
        if votes.bank is None:
            raise UsageError("the training pictures were not embedded: run knn's `before` first, or give bank=FOLDER")
        if self._bank is None or self._bank[0] is not votes:
            self._bank = (votes, *self._read(votes.bank, votes))
        _, bank, labels = self._bank
        queries = features.to(self._loaded.device)
        found = knn_votes(queries, bank, labels, len(votes.classes.names), votes.ks, votes.temperature)
        shares = {str(k): share.cpu() for k, share in found.items()}
        return [{k: _names(share[n], votes) for k, share in shares.items()} for n in range(len(features))]

    def _read(self, folder: Path, votes: Votes) -> tuple[Tensor, Tensor]:
        check_bank(folder, self.fingerprint())
        features, labels = read_bank(folder, votes.labels)
        if len(features) < max(votes.ks):
            raise UsageError(f"{folder} holds {len(features)} training features, fewer than k={max(votes.ks)}")
        device = self._loaded.device
        return torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)


def _names(shares: Tensor, votes: Votes) -> list[str]:
    values, order = shares.topk(min(_TOP, len(shares)))
    return [votes.classes.names[i] for i, value in zip(order.tolist(), values.tolist(), strict=True) if value > 0]


def encode(feature: NDArray[Any], store: str) -> str:
    """Return a feature ``(D,)`` as base64 of its little-endian numbers."""
    return base64.b64encode(feature.astype(np.dtype(store).newbyteorder("<")).tobytes()).decode("ascii")


def check_bank(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse training features that are unfinished or of another model.

    Raises:
        RunFolderError: the folder is no finished run.
        UsageError: its model, preprocessing, dtype or methods are not those of the fingerprint; names the fields.
    """
    if not (folder / RESULTS).is_file():
        raise RunFolderError(f"{folder} holds no finished run of training features")
    theirs = read_json(folder / RUN)
    ours = json.loads(json.dumps(fingerprint))
    fields = differing({k: theirs.get(k) for k in ours}, ours)
    if fields:
        shown = "; ".join(f"{k}: {theirs.get(k)!r} there, {ours[k]!r} now" for k in fields)
        raise UsageError(f"the training features in {folder} are of another model ({shown})")


def read_bank(folder: Path, labels: Mapping[str, int]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return training features ``(N, D)`` as they were stored, and their classes ``(N,)``; line by line.

    Raises:
        RunFolderError: damaged rows, or rows of pictures that are not in ``labels``.
    """
    found: list[NDArray[Any]] = []
    classes: list[int] = []
    path = folder / ROWS
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                feature = np.frombuffer(base64.b64decode(row["features"]), np.dtype(row["store"]).newbyteorder("<"))
                classes.append(labels[row["id"]])
            except (ValueError, KeyError, TypeError) as error:
                raise RunFolderError(f"{path}, line {number}: no feature of a training picture ({error!r})") from error
            if found and feature.shape != found[0].shape:
                raise RunFolderError(f"{path}, line {number}: {len(feature)} numbers; expected {len(found[0])}")
            found.append(feature)
    if not found:
        raise RunFolderError(f"{path} is empty")
    return np.stack(found).astype(found[0].dtype.newbyteorder("=")), np.asarray(classes, dtype=np.int64)
