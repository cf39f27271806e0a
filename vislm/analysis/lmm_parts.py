"""The parts of an LMM's analysis: from records to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vislm.analysis import sinks
from vislm.analysis.call_rows import CallRows
from vislm.analysis.entropy import HeadEntropy
from vislm.analysis.importance import PROXY
from vislm.analysis.lens import Readout, read_layers
from vislm.analysis.lmm_importance import lmm_head_importance
from vislm.analysis.massive import watch_blocks
from vislm.analysis.metrics import rank_correlation
from vislm.analysis.records import Recording, Sample, on_image
from vislm.analysis.results import Analysis
from vislm.analysis.retrieval import box_tokens
from vislm.analysis.rollout import Rollout, causal_uniform_row
from vislm.analysis.visual import dip
from vislm.errors import UsageError
from vislm.heads.vhr import token_divergence
from vislm.lmm.model import LMM, ImageSource

TITLES = {
    "probability_drop": "importance: loss of probability",
    "js_divergence": "importance: change of the distribution",
    "accuracy_drop": "importance: another answer",
    "feature_change": "importance: change of the features",
    "loss_increase": "importance: rise of the loss",
    PROXY: "importance: first-order proxy",
}


def add_visual(analysis: Analysis, samples: Sequence[Sample]) -> None:
    """Add shares of the key groups, entropy on the image, share of its sinks, text bias, norms of head outputs."""
    groups = samples[0].recording.key_groups
    image = groups.index("image")
    last = _mean(samples, lambda r: r.step("mass"))
    generated = _mean(samples, lambda r: _generated(r, "mass"))
    analysis.measure("visual.share_last", last[..., image], "share of the image, last prompt row", "(L, H) share")
    if bool(generated.isfinite().any()):
        analysis.measure("visual.share_generated", generated[..., image], "share of the image, answer", "(L, H) share")
    entropy = _mean(samples, lambda r: r.over_steps("visual_entropy").nanmean(0))
    analysis.measure("visual.entropy", entropy, "entropy on the image (1 = uniform)", "(L, H), over ln |V|, all rows")
    bias = last[..., groups.index("text_after")] + last[..., groups.index("generated")]
    analysis.measure("visual.text_bias", bias, "text bias: share behind the image", "(L, H), last prompt row")
    norm = _mean(samples, lambda r: r.step("head_norm"))
    analysis.measure("visual.head_norm", norm, "norm of the head's output, last prompt row", "(L, H)")
    if samples[0].recording.steps[0][min(samples[0].recording.steps[0])].sink_share is not None:
        share = _mean(samples, lambda r: r.step("sink_share"))
        analysis.measure("visual.sink_share", share, "share of the image's attention on its sinks", "(L, H)")
        centric = (share <= 0.5) & (last[..., image] >= 0.2)
        analysis.measure("visual.image_centric", centric.float(), "image-centric heads", "(L, H) 0 or 1")
    note = "(groups, L): mean over heads"
    names = [name.replace("_", " ") for name in groups]
    seen = [n for n in range(len(groups)) if float(last[..., n].max()) > 0]
    title = "Where the last prompt row looks"
    analysis.curves("visual.curve_last", last.mean(1).T[seen], title, note, [names[n] for n in seen], "share")
    if bool(generated.isfinite().any()):
        seen = [n for n in range(len(groups)) if float(generated[..., n].max()) > 0]
        title = "Where the answer's rows look"
        series = generated.mean(1).T[seen]
        analysis.curves("visual.curve_generated", series, title, note, [names[n] for n in seen], "share")
    carve = _mean(samples, lambda r: r.step("carve_entropy"))
    title = "Entropy of the head-mean map on the image (CARVE)"
    analysis.curves("visual.carve_entropy", carve[None], title, "(1, L) nats", ["last prompt row"], "nats")
    flow = torch.stack([sample.recording.stacked("flow") for sample in samples]).nanmean(0)
    analysis.add("visual.flow", flow, "(L, H, query groups, key groups) mean mass")
    layer, share = dip(last[..., image])
    analysis.header["neglect"] = {"layer": layer, "share": share}


def add_sinks(analysis: Analysis, samples: Sequence[Sample]) -> None:
    """Add how much keys draw, and the sink rate by place."""
    first, largest, rates = [], [], []
    for sample in samples:
        by_layer = []
        for _, record in sorted(sample.recording.prefill.items()):
            share = sinks.importance(record.received, record.valid)
            by_layer.append(sinks.from_first_valid(share, record.valid)[0])
        first.append(torch.stack([share[:, 0] for share in by_layer]))
        largest.append(torch.stack([_largest_seen(share) for share in by_layer]))
        length = min(share.shape[-1] for share in by_layer)
        rates.append(sinks.sink_rate(torch.stack([share[:, :length] for share in by_layer])))
    analysis.measure(
        "sinks.first", torch.stack(first).mean(0), "attention drawn by the first token", "(L, H) mean share"
    )
    title = "largest share drawn by a later token"
    analysis.measure("sinks.largest", torch.stack(largest).mean(0), title, "(L, H), tokens seen by 8 rows or more")
    length = min(len(rate) for rate in rates)
    rate = torch.stack([rate[:length] for rate in rates]).mean(0).cpu()
    analysis.add("sinks.rate_percent", rate, "(T,) share of layers, heads and images where the token is a sink")
    analysis.header["sink_rate_first_token"] = float(rate[0])
    sample = samples[0]
    if sample.visual:
        records = [record for _, record in sorted(sample.recording.prefill.items())]
        title = "(L, H, m) attention received by the first image's tokens, mean over the prompt's rows"
        received = [on_image(r.received, r.image_of, r.token_of, sample.visual)[0] / r.valid[0].sum() for r in records]
        analysis.add("sinks.received_image", torch.stack(received), title)


def add_dormant(analysis: Analysis, samples: Sequence[Sample]) -> None:
    """Add entropies of rows and columns, and the norm of the first token's value."""
    title = "entropy of rows (1 = uniform)"
    rows = torch.stack([torch.stack([e.row_mean[0] for e in _entropies(s.recording)]) for s in samples]).mean(0)
    analysis.measure("dormant.row_entropy", rows, title, "(L, H): low = sharp rows")
    columns = torch.stack([torch.stack([e.column_max[0] for e in _entropies(s.recording)]) for s in samples]).mean(0)
    title = "largest entropy of a column"
    analysis.measure("dormant.column_entropy", columns, title, "(L, H): high = one key is seen by all")
    ratio = _mean(samples, lambda r: r.stacked("value_ratio"))
    title = "norm of the first value over the mean"
    analysis.measure("dormant.value_ratio", ratio, title, "(L, H): small where the first token is a sink")


def add_divergence(analysis: Analysis, samples: Sequence[Sample]) -> None:
    """Add VHD of every layer and head, and T-VHD of the first answer token."""
    stacked = torch.stack([torch.stack([v[0] for _, v in sorted(s.recording.divergence.items())]) for s in samples])
    title = "VHD: change of the head's output without the image"
    analysis.measure("divergence.vhd", stacked.mean(0), title, "(L, H) Euclidean distance, last prompt row")
    half = max(1, stacked.shape[-1] // 2)
    total = torch.stack([token_divergence(vhd, half) for vhd in stacked])
    analysis.add("divergence.t_vhd", total, f"(images,) sum over layers of the {half} largest, first answer token")
    activity = torch.stack([torch.stack([v[0] for _, v in sorted(s.recording.text_activity.items())]) for s in samples])
    analysis.add("divergence.text_activity", activity.mean(0), "(L, H) squared norm of the output without the image")


def add_retrieval(
    analysis: Analysis, samples: Sequence[Sample], box: tuple[float, float, float, float] | None, expected: str | None
) -> None:
    """Add mass on a box and top-1 hit rate over the answer's rows, of samples that were answered rightly."""
    right = [s for s in samples if s.grids and (expected is None or expected.lower() in s.answer.lower())]
    if box is None or not right:
        reason = "give the box of what the answer is about" if box is None else f"no answer contains {expected!r}"
        analysis.header.setdefault("skipped", {})["retrieval"] = reason
        return
    masses, hits = [], []
    for sample in right:
        grid = sample.grids[0]
        inside = box_tokens(box, (grid.height, grid.width), grid.start, grid.row_stride)
        masses.append(sample.image_rows()[..., inside].sum(-1).mean(0))
        top = sample.recording.over_steps("top_token").long()
        hits.append(torch.isin(top.cpu(), torch.tensor(inside)).float().mean(0))
    title = "retrieval: attention on the box"
    analysis.measure("retrieval.box_mass", torch.stack(masses).mean(0), title, "(L, H), mean over the answer's rows")
    title = "retrieval: strongest key in the box"
    analysis.measure("retrieval.box_hits", torch.stack(hits).mean(0), title, "(L, H) share of the answer's rows")
    analysis.header["retrieval"] = {"box": list(box), "expected": expected, "counted": len(right)}


def add_rollout(analysis: Analysis, sample: Sample) -> None:
    """Add the rollout of the last prompt row on the image, over that of uniform causal attention."""
    records = [record for _, record in sorted(sample.recording.prefill.items())]
    if len({record.received.shape[-1] for record in records}) > 1:
        analysis.header.setdefault("skipped", {})["rollout"] = "tokens were dropped between layers"
        return
    calls = [CallRows(record.call) for record in records if record.call is not None]
    row = Rollout().row(calls, -1).cpu()
    relative = row / causal_uniform_row(row.shape[-1], len(calls))
    for name, values, what in (
        ("map", row, "rollout"),
        ("relative", relative, "rollout over that of uniform attention"),
    ):
        columns = records[0].image_of.cpu(), records[0].token_of.cpu()
        seen = on_image(values[:, None], *columns, sample.visual)[0, 0]
        analysis.add(f"rollout.{name}", seen, f"(m,) {what} of the last prompt row on the first image's tokens")


def add_massive(analysis: Analysis, lmm: LMM, images: Sequence[ImageSource], question: str) -> None:
    """Add the three largest activations and the median behind every layer."""
    curves = []
    found = None
    for image in images:
        with watch_blocks(lmm.adapter.layers) as activations, torch.no_grad():
            lmm.model(**lmm.prepare([image], [question]), use_cache=False)  # pyright: ignore[reportCallIssue]
        found = found or activations
        top = torch.stack([a.top[0].abs().cpu() for a in activations])
        median = torch.stack([a.median[0].cpu() for a in activations])
        curves.append(torch.cat([top.T, median[None]]))
    assert found is not None
    for name in ("top", "token", "dim"):
        stacked = torch.stack([getattr(a, name)[0] for a in found])
        analysis.add(f"massive.{name}", stacked, f"(L, 3) {name} of the largest activations, first image")
    massive = torch.stack([a.massive[0] for a in found])
    analysis.header["massive_layers"] = massive.any(-1).nonzero().flatten().tolist()
    note = "(4, L): the three largest |x| of the residual stream and the median"
    labels = ["largest", "second", "third", "median"]
    title = "Largest activations behind each layer"
    analysis.curves("massive.curve", torch.stack(curves).mean(0), title, note, labels, "|x|")


def add_lens(analysis: Analysis, lmm: LMM, image: ImageSource, question: str) -> None:
    """Add what every layer would say, by both readouts."""
    inputs = lmm.prepare([image], [question])
    tokenizer = lmm.processor.tokenizer
    curves: list[Tensor] = []
    names: tuple[Readout, ...] = ("norm_and_head", "input_embedding")
    for readout in names:
        lens = read_layers(lmm, inputs, readout)
        own = int(lens.log_probability[-1].argmax())
        curves.append(lens.probability(own))
        probability, ids = lens.top(5)
        analysis.add(f"lens.{readout}.probability", probability, "(L, 5) of the likeliest tokens")
        analysis.add(f"lens.{readout}.ids", ids, "(L, 5)")
        analysis.header.setdefault("lens", {})[readout] = [[tokenizer.decode([t]) for t in row] for row in ids.tolist()]
        analysis.header["lens"]["token"] = tokenizer.decode([own])
    title = f"Probability of the answer's first token, {analysis.header['lens']['token']!r}, read at each layer"
    analysis.curves(
        "lens.curve", torch.stack(curves), title, "(2, L)", [n.replace("_", " ") for n in names], "probability"
    )


def add_importance(analysis: Analysis, lmm: LMM, images: Sequence[ImageSource], question: str, rows: int) -> None:
    """Add what the answer's first token loses without each head, and how alike the metrics rank."""
    found = [lmm_head_importance(lmm, image, question, rows=rows) for image in images]
    maps = {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}
    for name, value in maps.items():
        analysis.measure(f"importance.{name}", value, TITLES[name], "(L, H), mean over images")
    analysis.add("importance.rank_correlation", rank_correlation(maps), "(M, M) Spearman, metrics in order")
    analysis.header["importance_metrics"] = list(maps)


def add_maps(analysis: Analysis, sample: Sample) -> None:
    """Add the rows of every step on the first image's tokens."""
    if not sample.visual:
        raise UsageError("the prompt has no image, so there are no maps to draw on one")
    note = "(steps, L, H, m) attention of each step's row on the first image's tokens"
    analysis.add("maps.image_rows", sample.image_rows().half(), note)
    analysis.add("maps.masses", sample.recording.over_steps("mass"), "(steps, L, H, key groups)")


def _mean(samples: Sequence[Sample], take: Callable[[Recording], Tensor]) -> Tensor:
    return torch.stack([take(sample.recording) for sample in samples]).nanmean(0).cpu()


def _generated(recording: Recording, name: str) -> Tensor:
    """Return the mean over the steps behind the first, NaN if there is none."""
    if len(recording.steps) < 2:
        return torch.full_like(recording.step(name), torch.nan)
    return recording.over_steps(name)[1:].mean(0)


def _entropies(recording: Recording) -> list[HeadEntropy]:
    return [record.entropy for _, record in sorted(recording.prefill.items()) if record.entropy is not None]


def _largest_seen(share: Tensor, least: int = 8) -> Tensor:
    """Return (H,): the largest share of (H, T) behind the first token; the last ones are seen by too few rows."""
    inner = share[:, 1 : max(2, share.shape[-1] - least + 1)]
    return inner.amax(-1)
