"""Everything about the heads of a ViT in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.analysis.distance import mean_profile, uniform_hops
from vislm.analysis.importance import PROXY, Predict, head_importance, predictor
from vislm.analysis.metrics import rank_correlation
from vislm.analysis.patterns import cluster_heads
from vislm.analysis.recorder import Recorder, check_maps, map_bytes
from vislm.analysis.results import Analysis, padded_stack
from vislm.analysis.rollout import Rollout
from vislm.analysis.vision import Site, readable
from vislm.analysis.vision_record import VisionRecording, record_vision
from vislm.analysis.what import chosen_parts
from vislm.errors import UsageError

PARTS = ("distance", "patterns", "sinks", "dormant", "massive", "rollout", "importance", "maps")
"""What can be asked of a ViT."""
IMPORTANCE_TITLES = {
    "probability_drop": "importance: loss of probability",
    "js_divergence": "importance: change of the distribution",
    "accuracy_drop": "importance: loss of accuracy",
    "feature_change": "importance: change of the features",
    "loss_increase": "importance: rise of the loss",
    PROXY: "importance: first-order proxy",
}


def analyze_vit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    what: str | Sequence[str] = "all",
    name: str = "",
    patch_size: float | None = None,
    clusters: int = 8,
    limit: int = 2**26,
    predict: Predict | None = None,
) -> Analysis:
    """Return the analysis of a model on images; means over them.

    Args:
        model: of timm, open_clip or vislm, with plain, window or neighborhood attention; put in evaluation mode before.
        images: (n, 3, H, W), normalised.
        labels: (n,) true classes; None: what the model predicts.
        what: "all", or names of :data:`PARTS`, in a list or separated by commas.
        name: of the model, for the header.
        patch_size: pixels of a patch's side, to give distances in pixels too.
        clusters: of patterns.
        limit: bytes that full maps of the first image may take; with "all", larger ones are left out.
        predict: how images become logits and features, for importance; None: as the model's library does.

    Raises:
        UsageError: attention that cannot be read, an unknown part, maps that were asked for and exceed ``limit``.
    """
    parts = chosen_parts(what, PARTS)
    if images.dim() != 4 or not len(images):
        raise UsageError(f"images have shape {tuple(images.shape)}, expected (n, 3, H, W)")
    analysis = Analysis({"kind": "vit", "model": name, "images": len(images), "what": list(parts)})
    with readable(model) as sites:
        with torch.no_grad():
            recordings = [
                record_vision(
                    model,
                    sites,
                    image[None],
                    Recorder("last_rows", keep_calls=number == 0, columns="dormant" in parts),
                )
                for number, image in enumerate(images)
            ]
        _describe(analysis, sites, recordings[0], images)
        if {"distance", "patterns", "sinks"} & set(parts):
            _profiles(analysis, recordings, parts, patch_size, clusters)
        if "dormant" in parts:
            _dormant(analysis, recordings)
        if "massive" in parts:
            _massive(analysis, recordings)
        if "rollout" in parts:
            _rollout(analysis, recordings[0])
        if "importance" in parts:
            _importance(analysis, head_importance(sites, predict or predictor(model), images, labels))
        if "maps" in parts:
            _maps(analysis, model, sites, images[:1], recordings[0], limit, asked=what != "all")
    return analysis


def _describe(analysis: Analysis, sites: Sequence[Site], recording: VisionRecording, images: Tensor) -> None:
    layers = recording.layers
    analysis.header |= {
        "layers": len(layers),
        "heads": [site.heads for site in sites],
        "names": [site.path for site in sites],
        "grids": [list(layer.grid) for layer in layers],
        "prefix": [layer.prefix for layer in layers],
        "input": list(images.shape[-2:]),
        "dtype": str(images.dtype).removeprefix("torch."),
        "uniform_grid": len({layer.grid for layer in layers}) == 1,
    }


def _profiles(
    analysis: Analysis,
    recordings: Sequence[VisionRecording],
    parts: Sequence[str],
    patch_size: float | None,
    clusters: int,
) -> None:
    depth = len(recordings[0].layers)
    profiles = [mean_profile([(1, r.layers[n].profile) for r in recordings]) for n in range(depth)]
    add, measure = analysis.add, analysis.measure
    if "distance" in parts:
        distance = padded_stack([p.mean_distance for p in profiles])
        measure("distance.mean", distance, "mean attention distance (patches)", "(L, H) patches")
        if patch_size is not None:
            add("distance.mean_pixels", distance * patch_size, "(L, H) pixels")
        entropy = padded_stack([p.patch_entropy for p in profiles])
        measure("distance.patch_entropy", entropy, "entropy over patches (nats)", "(L, H) nats")
        for name, title in (
            ("self_attention", "attention on itself"),
            ("prefix_mass", "attention on CLS and registers"),
        ):
            measure(f"distance.{name}", padded_stack([getattr(p, name) for p in profiles]), title, "(L, H) share")
        hops = padded_stack([p.hop_strength for p in profiles])
        add("distance.hop_strength", hops, "(L, H, hops) attention at a Chebyshev distance, not renormalised")
        baseline = padded_stack([uniform_hops(layer.grid, layer.prefix) for layer in recordings[0].layers])
        add(
            "distance.uniform_hops", baseline, "(L, hops) the same for uniform attention: divide to correct for borders"
        )
        add("distance.offsets", padded_stack([p.offsets for p in profiles]), "(L, H, 2h-1, 2w-1) by relative position")
    if "sinks" in parts:
        measure(
            "sinks.column_max",
            padded_stack([p.column_max for p in profiles]),
            "largest share drawn by one token",
            "(L, H) mean attention that the strongest token gets from all queries",
        )
        add("sinks.received", padded_stack([p.received for p in profiles]), "(L, H, P + N) mean attention received")
    if "patterns" in parts:
        if len({p.offsets.shape[1:] for p in profiles}) > 1:
            reason = "stages of different grids have no common relative positions"
            analysis.header.setdefault("skipped", {})["patterns"] = reason
            return
        found = cluster_heads(profiles, clusters=clusters)
        measure("patterns.cluster", found.cluster.float(), "cluster of the pattern", "(L, H) number of the cluster")
        add("patterns.code", found.code.float(), "(heads, components) principal components, layer by layer")
        analysis.header["patterns"] = {"clusters": found.names, "kinds": found.kinds}


def _dormant(analysis: Analysis, recordings: Sequence[VisionRecording]) -> None:
    found = [[layer.entropy for layer in recording.layers if layer.entropy is not None] for recording in recordings]
    for name, title, take in (
        ("row_entropy", "entropy of rows (1 = uniform)", lambda entropy: entropy.row_mean[0]),
        ("column_entropy", "largest entropy of a column", lambda entropy: entropy.column_max[0]),
    ):
        mean = torch.stack([padded_stack([take(entropy).cpu() for entropy in layers]) for layers in found]).mean(0)
        note = "(L, H): low = sharp rows" if name == "row_entropy" else "(L, H): high = one key is seen by all"
        analysis.measure(f"dormant.{name}", mean, title, note)


def _massive(analysis: Analysis, recordings: Sequence[VisionRecording]) -> None:
    first = recordings[0].activations
    analysis.add("massive.top", torch.stack([a.top[0] for a in first]), "(L, 3) largest activations of the first image")
    analysis.add("massive.token", torch.stack([a.token[0] for a in first]), "(L, 3) their tokens")
    analysis.add("massive.dim", torch.stack([a.dim[0] for a in first]), "(L, 3) their dimensions")
    size = torch.stack([torch.stack([a.top[0].abs().float().cpu() for a in r.activations]) for r in recordings]).mean(0)
    median = torch.stack([torch.stack([a.median[0].cpu() for a in r.activations]) for r in recordings]).mean(0)
    analysis.curves(
        "massive.curve",
        torch.cat([size.T, median[None]]),
        "Largest activations behind each block",
        "(4, L): the three largest |x| and the median",
        [*("largest", "second", "third")[: size.shape[1]], "median"],
        "|x|",
    )


def _rollout(analysis: Analysis, recording: VisionRecording) -> None:
    layers = recording.layers
    if not analysis.header["uniform_grid"]:
        analysis.header.setdefault("skipped", {})["rollout"] = "stages of different grids have no rollout"
        return
    rows: Any = [layer.rows for layer in layers]
    prefix, grid = layers[0].prefix, layers[0].grid
    if prefix:
        row = Rollout().row(rows, 0)[0]
        note = "(h, w) rollout of the class token on patches, first image"
    else:
        row = Rollout().matrix(rows)[0].mean(0)
        note = "(h, w) mean rollout of all patches, first image"
    analysis.add("rollout.map", row[prefix:].view(grid), note)


def _importance(analysis: Analysis, maps: dict[str, Tensor]) -> None:
    for name, value in maps.items():
        analysis.measure(f"importance.{name}", value, IMPORTANCE_TITLES[name], "(L, H), mean over images")
    if len(maps) > 1:
        analysis.add("importance.rank_correlation", rank_correlation(maps), "(M, M) Spearman, metrics in order")
        analysis.header["importance_metrics"] = list(maps)


def _maps(
    analysis: Analysis,
    model: nn.Module,
    sites: Sequence[Site],
    image: Tensor,
    recording: VisionRecording,
    limit: int,
    asked: bool,
) -> None:
    wanted = sum(map_bytes(layer.rows.shape, 1) for layer in recording.layers if layer.rows is not None)
    if asked:
        check_maps(wanted, limit, f"{len(recording.layers)} layers")
    if wanted <= limit:
        full = record_vision(model, sites, image, Recorder("maps", limit=limit))
        stacked = padded_stack([layer.map[0] for layer in full.layers if layer.map is not None])
        analysis.add("maps.full", stacked.half(), "(L, H, P + N, P + N) attention of the first image")
        return
    analysis.header.setdefault("skipped", {})["maps"] = (
        f"full maps take {wanted / 2**20:,.0f} MiB, the limit is {limit / 2**20:,.0f} MiB; rows of prefix tokens stay"
    )
    if recording.layers[0].prefix:
        few = padded_stack([layer.prefix_rows[0] for layer in recording.layers if layer.prefix_rows is not None])
        analysis.add("maps.prefix_rows", few.half(), "(L, H, P, P + N) rows of prefix tokens, first image")
