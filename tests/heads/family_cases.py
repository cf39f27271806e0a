"""For every head method: settings that act on tiny models, settings that must not, and its equations in loops.

Written from the papers' equations, on whole matrices; nothing of the methods' own code is used but the noise that VCD
draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from family_eager import Sample, explicit, language_model, plain
from torch import Tensor

from vislm.heads.act import ACT
from vislm.heads.ad_hh import ADHH
from vislm.heads.air import AIR
from vislm.heads.dola import DoLa
from vislm.heads.ilvad import ILVAD
from vislm.heads.imbalanced import Imbalanced
from vislm.heads.opera import OPERA
from vislm.heads.pai import PAI
from vislm.heads.spin import SPIN
from vislm.heads.vaf import VAF
from vislm.heads.var import VAR
from vislm.heads.vcd import VCD, noise_for
from vislm.heads.vhr import VHR
from vislm.heads.zerotuning import ZeroTuning
from vislm.lmm.adapters import adapter_for

Reference = Callable[[Sample, Tensor], Tensor]
"""Gets an answer (n,) and returns the logits (1 + n, V) that the method gives."""

HEADS = ((1, 2), (3, 0), (3, 3))
LISTED = {1: (2,), 3: (0, 3)}


@dataclass(frozen=True)
class Case:
    """What is tested of one method."""

    method: Any
    neutral: tuple[Any, ...]
    reference: Reference | None
    """None: compared in a test of its own."""
    variants: dict[str, tuple[Any, Reference]] = field(default_factory=dict)


# -- rows of logits --------------------------------------------------------------------------------------------------
def pai(sample: Sample, answer: Tensor) -> Tensor:
    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        changed = logits.clone()
        if layer in (1, 3):
            for row in range(sample.length - 1, logits.shape[2]):
                changed[:, :, row, sample.image] += 0.5 * changed[:, :, row, sample.image].abs()
        return plain(changed, mask)

    with_image = sample.logits(answer, edit).log_softmax(-1)
    without = sample.run(sample.without_image(answer)).logits[0, -len(answer) - 1 :].log_softmax(-1)
    scores = 1.3 * (with_image - without) + without
    return scores.masked_fill(with_image < with_image.max(-1, keepdim=True).values + math.log(0.1), -torch.inf)


def vaf(sample: Sample, answer: Tensor) -> Tensor:
    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        changed = logits.clone()
        if layer in (1, 2, 4):
            changed[:, :, sample.end :, sample.image] *= 1.5
            changed[:, :, sample.end :, : sample.start] *= 0.7
        return plain(changed, mask)

    return sample.logits(answer, edit)


def imbalanced(sample: Sample, answer: Tensor) -> Tensor:
    strength = tower_strength(sample, 0.9, 0.3, 0.4)

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        changed = logits.clone()
        if layer in (1, 2, 4):
            for row in range(sample.length - 1, logits.shape[2]):
                own = changed[:, :, row, sample.image]
                changed[:, :, row, sample.image] = own + strength * own.abs()
        return plain(changed, mask)

    return sample.logits(answer, edit)


def tower_strength(sample: Sample, alpha: float, beta: float, ratio: float) -> Tensor:
    """Strengths (|V|,) from explicit matrices of the vision tower; patches become tokens as the family says."""
    model, adapter = sample.model, adapter_for(sample.model)
    maps: dict[int, list[Tensor]] = {}
    modules = adapter.tower_attentions

    def look(number: int) -> Callable[[Tensor, Tensor], Tensor]:
        def attend(logits: Tensor, mask: Tensor) -> Tensor:
            weights = plain(logits, mask)
            row = weights[:, :, 0] if adapter.tower_prefix else weights.mean(2)
            maps.setdefault(number, []).append(row.sum(1)[:, adapter.tower_prefix :])
            return weights

        return attend

    with explicit(model, "vision_config", {m: look(n) for n, m in enumerate(modules)}), torch.no_grad():
        model(**sample.behind(answer=torch.tensor([], dtype=torch.long)))
    whole = range(len(modules))
    if sample.family == "qwen2_5_vl":
        whole = model.config.vision_config.fullatt_block_indexes
    first, penultimate = maps[whole[0]], maps[[n for n in whole if n <= len(modules) - 2][-1]]
    arguments = {k: v for k, v in sample.inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
    newline = -1.0
    crops = adapter.crops(arguments)

    def packed(parts: list[Tensor]) -> Tensor:
        entries = torch.cat(parts)[..., None].split(crops)
        return torch.cat([adapter.pack(part, arguments, n, newline)[:, 0] for n, part in enumerate(entries)])

    tokens = [packed(parts) for parts in (first, penultimate)]
    patches = [place for place, value in enumerate(tokens[0].tolist()) if value != newline]
    scores = [values[patches].double().numpy() for values in tokens]
    low, high = np.percentile(scores[1], [25, 75])
    summary = np.argsort(-scores[1], kind="stable")[: int((scores[1] > high + 1.5 * (high - low)).sum())].tolist()
    local = np.argsort(-scores[0], kind="stable")[: math.floor(ratio * len(patches))].tolist()
    strength = torch.zeros(len(sample.image))
    for number in local:
        strength[patches[number]] = alpha
    for number in summary:
        strength[patches[number]] = beta
    return strength


def zerotuning(sample: Sample, answer: Tensor) -> Tensor:
    factors = {(0, 1): 3.0, (2, 0): 0.3, (2, 3): 2.0}

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        for (own, head), gamma in factors.items():
            if own == layer:
                first = weights[:, head, :, :1]
                total = (gamma - 1.0) * first + 1.0
                weights[:, head] = torch.cat([gamma * first, weights[:, head, :, 1:]], -1) / total
        return weights

    return sample.logits(answer, edit)


# -- rows of weights -------------------------------------------------------------------------------------------------
def spin(sample: Sample, answer: Tensor) -> Tensor:
    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        for row in range(sample.length - 1, logits.shape[2]):
            score = logits[0, :, row, sample.image].sum(-1).tolist()
            for head in sorted(range(len(score)), key=lambda h: -score[h])[2:]:
                weights[:, head, row] *= 0.08
        return weights

    return sample.logits(answer, edit)


def silenced(sample: Sample, weights: Tensor, layer: int, threshold: float) -> Tensor:
    for head in LISTED.get(layer, ()):
        for row in range(sample.length - 1, weights.shape[2]):
            if weights[0, head, row, sample.end :].sum() >= threshold:
                weights[0, head, row, sample.end :] = 0.0
    return weights


def ad_hh(sample: Sample, answer: Tensor) -> Tensor:
    return sample.logits(answer, lambda logits, mask, layer: silenced(sample, plain(logits, mask), layer, 0.05))


def air(sample: Sample, answer: Tensor, released: bool = False) -> Tensor:
    middle, scaled, length = (1, 3, 4), (1, 2), sample.length

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        s = logits.clone()
        allowed = mask[0, 0] > -1.0
        if released and layer in middle:
            norms = s[0, :, :length, :length].square().sum((1, 2))
            s[0, :, :length] *= balance(norms)
            for row in range(length, s.shape[2]):
                s[0, :, row] *= balance(s[0, :, row, : row + 1].square().sum(-1))[:, 0]
        if layer in scaled:
            s[:, :, sample.end :, sample.image] *= 1.08
            s[:, :, sample.end :, : sample.start] *= 0.97
        if layer in middle:
            for row in range(length - 1, s.shape[2]):
                s[0, :, row, sample.image] += 0.28 * s[0, :, row, sample.image].abs().mean(0)
        a = silenced(sample, plain(s, mask), layer, 0.05)
        if layer not in middle:
            return a
        if released:
            block = a[0, :, :length, :length]
            rest = block - torch.eye(length) * (block.diagonal(dim1=1, dim2=2).sum(-1) / length)[:, None, None]
            size = [m.square().sum((1, 2)).sqrt() for m in (block, rest)]
            block = rest * (size[0] / (size[1] + 1e-8))[:, None, None]
            a[0, :, :length, :length] = 0.9 * block + 0.1 * block.mean((1, 2))[:, None, None]
        for row in range(length, s.shape[2]):
            own = a[0, :, row, allowed[row]]
            a[0, :, row, allowed[row]] = 0.9 * own + 0.1 * own.mean(-1, keepdim=True)
        return a

    def balance(norms: Tensor) -> Tensor:
        return (norms.mean() / (norms + 1e-8)).sqrt().clamp(0.8, 1.25)[:, None, None]

    return sample.logits(answer, edit)


def act(sample: Sample, answer: Tensor) -> Tensor:
    length = sample.length

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        for head in LISTED.get(layer, ()):
            m = weights[0, head]
            mean = [m[:length, j].sum().item() / (length - j) for j in range(length)]
            sinks = [j for j in range(length) if mean[j] > 0.03][1:]
            others = [j for j in range(m.shape[1]) if j not in sinks]
            for row in range(m.shape[0]):
                freed, rest = 0.6 * m[row, sinks].sum(), m[row, others].sum()
                if rest > 0.0:
                    m[row, others] += freed * m[row, others] / rest
                    m[row, sinks] *= 0.4
        return weights

    return sample.logits(answer, edit)


VAR_DIMS = (3, 7, 20)


def var(sample: Sample, answer: Tensor) -> Tensor:
    entering: dict[int, Tensor] = {}

    def remember(number: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            entering[number] = (args[0] if args else kwargs["hidden_states"])[0, : sample.length]

        return hook

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        if layer not in (2, 3):  # sinks form behind two layers; the last one is left alone
            return weights
        x, image = entering[layer], sample.image
        n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sinks = (n[:, list(VAR_DIMS)].abs().amax(-1) > 1.6).nonzero().flatten().tolist()
        visual, others = [k for k in sinks if k in image], [k for k in image if k not in sinks]
        for head in range(weights.shape[1]):
            for row in range(sample.end, weights.shape[2]):
                a = weights[0, head, row].clone()
                share = a[visual].sum() / (a[image] + 1e-6).sum()
                if visual and share <= 0.6 and a[image].sum() >= 0.05 and a[others].sum() > 0.0:
                    weights[0, head, row, sinks] *= 0.3
                    weights[0, head, row, others] += 0.7 * a[sinks].sum() * a[others] / a[others].sum()
        return weights

    layers = language_model(sample.model).layers
    hooks = [layer.register_forward_pre_hook(remember(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        return sample.logits(answer, edit)
    finally:
        for hook in hooks:
            hook.remove()


# -- heads -----------------------------------------------------------------------------------------------------------
def vhr(sample: Sample, answer: Tensor, text_too: bool = True) -> Tensor:
    """Layer by layer: two whole runs that carry what was found so far, and the next layer's heads from both."""
    chosen: dict[int, Tensor] = {}

    def scaled(factors: dict[int, Tensor]) -> Any:
        return lambda logits, mask, layer: plain(logits, mask) * factors.get(layer, torch.ones(4))[None, :, None, None]

    nothing = torch.tensor([], dtype=torch.long)
    for layer in (1, 2, 4):
        a = head_output(sample, sample.behind(nothing), scaled(chosen), layer)
        u = head_output(sample, sample.without_image(nothing), scaled(chosen if text_too else {}), layer)
        vhd, activity = (a - u).square().sum(-1).sqrt(), u.square().sum(-1)
        high = [x > x.mean() + x.std() for x in (vhd, activity)]
        vhd = torch.where(high[0] & high[1], 0.0, vhd)
        median = sorted(vhd.tolist())[(len(vhd) - 1) // 2]
        chosen[layer] = torch.where(vhd > median, 2.0, 1.0)
    return sample.logits(answer, scaled(chosen))


def head_output(sample: Sample, inputs: dict[str, Any], edit: Any, layer: int) -> Tensor:
    """(H, d) heads' outputs of the last row, in front of a layer's output projection."""
    seen: list[Tensor] = []
    projection = language_model(sample.model).layers[layer].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
    try:
        sample.run(inputs, edit)
    finally:
        hook.remove()
    return seen[0].unflatten(-1, (4, -1))


# -- next tokens -----------------------------------------------------------------------------------------------------
def dola(sample: Sample, answer: Tensor) -> Tensor:
    out = sample.run(sample.behind(answer), output_hidden_states=True)
    p = out.logits[0, sample.length - 1 :].softmax(-1)
    norm, head = language_model(sample.model).norm, sample.model.lm_head
    with torch.no_grad():
        early = [head(norm(out.hidden_states[n]))[0, sample.length - 1 :].softmax(-1) for n in (1, 3, 4)]
    rows = []
    for step in range(len(p)):
        distances = []
        for q in early:
            m = (p[step] + q[step]) / 2
            distances.append(sum((x * (x / m).log()).nan_to_num().sum().item() for x in (p[step], q[step])))
        best = early[distances.index(max(distances))][step]
        rows.append((p[step] / best).log().masked_fill(p[step] < 0.1 * p[step].max(), -torch.inf))
    return torch.stack(rows)


def vcd(sample: Sample, answer: Tensor, with_image: Tensor | None = None) -> Tensor:
    step, share = 700, 1.0
    for t in range(step + 1):
        share *= 1.0 - (1.0 / (1.0 + math.exp(6.0 - 12.0 * t / 999)) * (0.005 - 1e-5) + 1e-5)

    def noised(piece: Tensor) -> Tensor:
        return math.sqrt(share) * piece + math.sqrt(1.0 - share) * noise_for(piece, 3)

    pixels = sample.inputs["pixel_values"]
    if "image_grid_thw" in sample.inputs:  # patches of 3 channels, 2 frames, 4 x 4 pixels
        other = noised(pixels.unflatten(1, (3, 2, 4, 4))).flatten(1)
    else:
        other = torch.stack([noised(crop) for crop in pixels.flatten(0, -4)]).reshape(pixels.shape)
    logits = sample.logits(answer) if with_image is None else with_image
    distorted = sample.run({**sample.behind(answer), "pixel_values": other}).logits[0, sample.length - 1 :]
    mixed = 1.6 * logits - 0.6 * distorted
    return mixed.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(0.2), -torch.inf)


# -- a draft first ---------------------------------------------------------------------------------------------------
def ilvad(sample: Sample, answer: Tensor, draft: Tensor | None = None) -> Tensor:
    draft = sample.greedy(5) if draft is None else draft
    saliency = torch.tensor(evidence(draft_maps(sample, draft), 3.0, 1.3))
    image, end, length = sample.image, sample.end, sample.length

    def edit(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        if layer not in (1, 2, 3):
            return weights
        original, scores = weights[0].clone(), []
        for row in range(end, logits.shape[2]):
            a = original[:, row]
            mass = (a[:, image] * saliency).sum(-1)
            looks = largest(mass / a[:, image].sum(-1))
            scores.append(mass[looks].mean().item())
            if row < length - 1:
                continue
            reads = largest(a[:, end : row + 1].sum(-1))
            low, high = min(scores), max(scores)
            gain = torch.tensor([(score - low) / (high - low) + 0.4 if high > low else 0.4 for score in scores])
            new = a.clone()
            for head in looks:
                new[head, image] *= saliency.exp()
            new[reads, end : row + 1] *= gain
            weights[0, :, row] = new / new.sum(-1, keepdim=True)
        return weights

    return sample.logits(answer, edit)


def largest(scores: Tensor) -> list[int]:
    """The half of the heads with the highest scores; ties go to the lower one."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda head: -values[head])[: len(values) // 2]


def draft_maps(sample: Sample, draft: Tensor) -> Tensor:
    """Attention (L, V) on the image in a draft (n,): mean over steps 2.. and the half of heads that look most."""
    seen: dict[int, Tensor] = {}

    def record(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
        weights = plain(logits, mask)
        rows = [weights[0, :, row][:, sample.image] for row in range(sample.length, weights.shape[2])]
        seen[layer] = torch.stack([row[largest(row.sum(-1))].mean(0) for row in rows]).mean(0)
        return weights

    sample.logits(draft[:-1], record)
    return torch.stack([seen[layer] for layer in sorted(seen)])


def evidence(maps: Tensor, alpha: float, activation: float) -> list[float]:
    """ln E by loops, of maps (L, V)."""
    layers, count = maps.shape
    active = [[maps[n, k] > activation * maps[n].mean() for k in range(count)] for n in range(layers)]
    jumps = [float(sum(bool(active[n][k] and not active[n - 1][k]) for n in range(1, layers))) for k in range(count)]
    overall = maps.mean(0)
    jumps = [jump if overall[k] > overall.mean() else 0.0 for k, jump in enumerate(jumps)]
    mean = sum(jumps) / count
    std = math.sqrt(sum((jump - mean) ** 2 for jump in jumps) / (count - 1))
    jumps = [min(max(jump, mean - 3 * std), mean + 3 * std) for jump in jumps]
    low, high = min(jumps), max(jumps)
    return [alpha * (jump - low) / (high - low) if high > low else 0.0 for jump in jumps]


AIR_OPTIONS: dict[str, Any] = {"heads": HEADS, "threshold": 0.05, "layers": (1, 3, 4), "scaled_layers": (1, 2)}
VAR_OPTIONS: dict[str, Any] = {"dims": VAR_DIMS, "tau": 1.6, "summ": 0.05, "rho": 0.6}

CASES = {
    "act": Case(ACT(heads=HEADS, threshold=0.03), (ACT(heads=()), ACT(heads=HEADS, beta=1.0)), act),
    "ad_hh": Case(ADHH(heads=HEADS, threshold=0.05), (ADHH(heads=()), ADHH(heads=HEADS, threshold=1.5)), ad_hh),
    "air": Case(
        AIR(**AIR_OPTIONS),
        (AIR(heads=(), enhance=1.0, suppress=1.0, lift=0.0, beta=0.0),),
        air,
        {
            "as released": (
                AIR(**AIR_OPTIONS, project_prefill=True, rescale_logits=True),
                lambda sample, answer: air(sample, answer, released=True),
            )
        },
    ),
    "dola": Case(DoLa(layers=(1, 3, 4)), (DoLa(layers=()),), dola),
    "ilvad": Case(
        ILVAD(alpha=3.0, beta=0.4, activation=1.3, layers=(1, 2, 3), draft_tokens=5),
        (ILVAD(alpha=0.0, beta=1.0), ILVAD(layers=())),
        ilvad,
    ),
    "imbalanced": Case(
        Imbalanced(alpha=0.9, local_token_ratio=0.4, layers=(1, 2, 4)),
        (Imbalanced(alpha=0.0, beta=0.0), Imbalanced(head_gain=(0.0,) * 4), Imbalanced(layers=())),
        imbalanced,
    ),
    "opera": Case(
        OPERA(num_beams=2, candidates=2, image_steps=2, penalty_weight=1e5, threshold=2, scale_factor=20.0),
        (OPERA(penalty_weight=0.0, threshold=None),),
        None,
    ),
    "pai": Case(PAI(alpha=0.5, gamma=1.3, layers=(1, 3)), (PAI(alpha=0.0, gamma=1.0), PAI(gamma=1.0, layers=())), pai),
    "spin": Case(SPIN(keep_ratio=0.5), (SPIN(keep_ratio=1.0), SPIN(suppressed_scale=1.0), SPIN(layers=())), spin),
    "vaf": Case(
        VAF(enh_para=1.5, sup_para=0.7, layers=(1, 2, 4)), (VAF(enh_para=1.0, sup_para=1.0), VAF(layers=())), vaf
    ),
    "var": Case(
        VAR(p=0.3, **VAR_OPTIONS),
        (VAR(p=1.0), VAR(p=0.0, p_reading="paper_moves"), VAR(**VAR_OPTIONS, layers=())),
        var,
    ),
    "vcd": Case(VCD(alpha=0.6, beta=0.2, noise_step=700, seed=3), (VCD(alpha=0.0),), vcd),
    "vhr": Case(
        VHR(layers=(1, 2, 4)),
        (VHR(alpha=1.0),),
        vhr,
        {
            "image only": (
                VHR(layers=(1, 2, 4), text_stream="image_only"),
                lambda sample, answer: vhr(sample, answer, text_too=False),
            )
        },
    ),
    "zerotuning": Case(
        ZeroTuning(factors=((0, 1, 3.0), (2, 0, 0.3), (2, 3, 2.0))),
        (ZeroTuning(factors=()), ZeroTuning(heads=HEADS, gamma=1.0)),
        zerotuning,
    ),
}
"""Every module of ``vislm.heads`` that is a session's method has to be here (see test_families_heads)."""

NO_STAGES = {"carve": "a function that asks twice, not a session's stage"}
