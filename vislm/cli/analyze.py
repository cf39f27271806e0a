"""``vislm analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vislm.cli._options import Device, Dtype, Heads, Prune, interventions, load

if TYPE_CHECKING:
    from PIL.Image import Image

    from vislm.analysis.results import Analysis

_WHAT = "all, or some of: visual, sinks, dormant, massive, divergence, retrieval, rollout, lens, importance, knockout, "
_WHAT += "tower, maps (LMM); distance, patterns, sinks, dormant, massive, rollout, importance, maps (ViT)."


def analyze(
    image: Annotated[
        list[Path], typer.Option("--image", "-i", help="A picture file. May be repeated: means over all.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|HUB",
            help="An LMM (vislm-tiny, a folder, a hub name), a backbone of vislm or timm, or open_clip:ARCHITECTURE.",
        ),
    ] = "vislm-tiny",
    prompt: Annotated[str, typer.Option("--prompt", "-q", help="The question to an LMM.")] = "Describe the image.",
    what: Annotated[str, typer.Option("--what", metavar="PART,...", help=_WHAT)] = "all",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html, pictures and numbers.")] = Path(
        "out/analysis"
    ),
    label: Annotated[
        list[int] | None, typer.Option(help="True class of each image, for a ViT; default: what it predicts.")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="LEFT,TOP,RIGHT,BOTTOM from 0 to 1: what the answer is about (retrieval).")
    ] = None,
    expected: Annotated[str | None, typer.Option(help="Word of a right answer (retrieval counts only those).")] = None,
    cut: Annotated[
        list[str] | None, typer.Option(help="What knockout cuts, e.g. 'image>last'. May be repeated.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers that knockout cuts together.")] = 1,
    tau: Annotated[float, typer.Option(help="Normalised activation above which a token is a sink.")] = 20.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Steps of the answer that are recorded.")] = 32,
    prune: Prune = None,
    heads: Heads = None,
    weights: Annotated[Path | None, typer.Option(help="A safetensors file of a ViT's state dict.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="timm's or open_clip's weights; may download.")
    ] = False,
    size: Annotated[str | None, typer.Option(help="Show a ViT the picture at 448 or 320x480 (height x width).")] = None,
    seed: Annotated[int, typer.Option(help="Of a ViT's random weights.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="MiB that full maps of a ViT may take.")] = 64,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Look at attention, layer by layer and head by head: numbers, head maps, overlays and a page with sliders."""
    from vislm.errors import UsageError
    from vislm.report.analysis.page import write_report

    if _is_lmm(model):
        if label or weights or pretrained or size:
            raise UsageError("--label, --weights, --pretrained and --size are for ViTs; this is an LMM")
        options = {"max_new_tokens": max_new_tokens, "expected": expected, "window": window, "tau": tau}
        if cut:
            options["edges"] = cut
        analysis, picture = _lmm(load(model, dtype, device), image, prompt, what, _box(box), prune, heads, options)
    else:
        if prune or heads or box or expected or cut:
            raise UsageError("--prune, --heads, --box, --expected and --cut are for LMMs; this is a ViT")
        analysis, picture = _vit(model, image, what, label, weights, pretrained, size, seed, limit, device)
    files = [*analysis.save(out), *write_report(analysis, picture, out, footer=_footer(analysis))]
    for path in files:
        typer.echo(f"written to {path}")


def _is_lmm(model: str) -> bool:
    import json

    from vislm.lmm.loading import EMBEDDED

    folder = Path(model)
    if (folder / "config.json").is_file():
        try:
            return (
                "architectures" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
                and not (folder / "open_clip_config.json").is_file()
            )
        except ValueError:
            return True  # the loader tells what is wrong with it
    return model in EMBEDDED or (model.count("/") == 1 and not folder.exists() and ":" not in model)


def _box(text: str | None) -> tuple[float, float, float, float] | None:
    from vislm.errors import UsageError

    if text is None:
        return None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--box {text}: expected LEFT,TOP,RIGHT,BOTTOM such as 0.2,0.1,0.5,0.6") from None
    return left, top, right, bottom


def _lmm(
    lmm,
    images: list[Path],
    prompt: str,
    what: str,
    box,
    prune: list[str] | None,
    heads: list[str] | None,
    options: dict,
) -> tuple[Analysis, Image]:
    from vislm.analysis.run_lmm import analyze_lmm
    from vislm.images import load_image
    from vislm.report.overlay import seen_picture

    pictures = [load_image(path) for path in images]
    with lmm.using(*interventions(prune, heads)):
        analysis = analyze_lmm(lmm, pictures, prompt, what=what, box=box, **options)
    return analysis, seen_picture(pictures[0], lmm.adapter, lmm.processor)


def _vit(
    name: str,
    images: list[Path],
    what: str,
    labels: list[int] | None,
    weights: Path | None,
    pretrained: bool,
    size: str | None,
    seed: int,
    limit: int,
    device: str,
) -> tuple[Analysis, Image]:
    import torch

    from vislm.analysis.run_vit import analyze_vit
    from vislm.cli._sizes import parse_sizes
    from vislm.errors import UsageError
    from vislm.images import load_image
    from vislm.report.analysis.vision_models import load_vision

    if labels is not None and labels and len(labels) != len(images):
        raise UsageError(f"{len(labels)} labels for {len(images)} images; give one --label per --image")
    sides = None if size is None else parse_sizes("--size", size, axes=2)
    shape = None if sides is None else (sides[0], sides[1])
    vision = load_vision(name, weights=weights, pretrained=pretrained, size=shape, seed=seed)
    pictures = [vision.shown(load_image(path), images=len(images)) for path in images]
    analysis = analyze_vit(
        vision.model.to(device),
        torch.cat([vision.pixels(picture) for picture in pictures]).to(device),
        torch.tensor(labels) if labels else None,
        what=what,
        name=name,
        limit=limit * 2**20,
    )
    if not vision.trained:
        analysis.header["weights"] = f"random, seed {seed}"
    return analysis, pictures[0]


def _footer(analysis: Analysis) -> str:
    import torch

    import vislm

    weights = analysis.header.get("weights")
    about = f"vislm {vislm.__version__}, torch {torch.__version__}. Parts: {', '.join(analysis.header['what'])}."
    return about if weights is None else f"Untrained weights ({weights}): shapes only, no meaning. {about}"
