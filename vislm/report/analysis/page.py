"""The report: pictures, and one self-contained page with sliders over layers and heads."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vislm.analysis.results import Analysis
from vislm.files import atomic_write
from vislm.report.analysis.clusters import cluster_figure
from vislm.report.analysis.curves import curve_sheet, hop_figure, matrix_figure
from vislm.report.analysis.explorer import explorer_data, picture_uri, script_safe
from vislm.report.analysis.heatmaps import head_sheet
from vislm.report.analysis.overlays import overlay_sheet
from vislm.report.page import Figure

TEMPLATES = Path(__file__).parent.parent / "templates"
CAPTIONS = {
    "heads": "All head maps of this analysis: layers down, heads to the right.",
    "overlays": "Where attention lies on the picture, mean over heads; each map has its own scale.",
    "curves": "By layer.",
    "hops": "Strength by distance, mean over the heads of each layer. Right: over uniform attention, which corrects "
    "for patches at the border having fewer far neighbours.",
    "clusters": "The mean attention by relative position (centre: the patch itself) of each cluster of heads, with the "
    "kind that most of its heads are. Own colour scale each.",
    "agreement": "Rank correlation (Spearman) between the measures of importance; a dash where one is constant.",
    "flow": "Which tokens (rows) look at which (columns): mean attention over all layers and heads.",
}


def write_report(
    analysis: Analysis, picture: Image.Image, folder: Path, *, title: str = "", footer: str = ""
) -> list[Path]:
    """Write ``index.html`` and the PNG files of an analysis; return their paths, the page first.

    The page works from the disk without a network: pictures and data are inside, its one script is allowed by its hash,
    and all texts are escaped.

    Args:
        analysis: from ``vislm.analysis``.
        picture: what the model saw of the first image.
        folder: where to write.
        title: headline; None: the model's name.
        footer: small print.
    """
    folder = Path(folder)
    figures = draw_figures(analysis, picture, folder)
    page = folder / "index.html"
    content = render_report(analysis, picture, figures, title=title, footer=footer)
    with atomic_write(page) as handle:
        handle.write(content)
    return [page, *figures.values()]


def draw_figures(analysis: Analysis, picture: Image.Image, folder: Path) -> dict[str, Path]:
    """Write the PNG files that this analysis has the numbers for; return name -> path."""
    header, tensors = analysis.header, analysis.tensors
    figures: dict[str, Path] = {}
    overlays = overlay_sheet(analysis, picture, folder / "overlays.png")
    if overlays is not None:
        figures["overlays"] = overlays
    if header.get("measures"):
        figures["heads"] = head_sheet(analysis, folder / "heads.png")
    if header.get("curves"):
        figures["curves"] = curve_sheet(analysis, folder / "curves.png")
    if "distance.hop_strength" in tensors:
        figures["hops"] = hop_figure(analysis, folder / "hops.png")
    if "patterns.cluster" in tensors and "distance.offsets" in tensors:
        figures["clusters"] = cluster_figure(analysis, folder / "clusters.png")
    if "visual.flow" in tensors:
        flow = tensors["visual.flow"].nanmean((0, 1)).numpy()
        rows, columns = np.isfinite(flow).any(1), np.nansum(flow, 0) > 0
        named = [list(np.array(header[n])[used]) for n, used in (("query_groups", rows), ("key_groups", columns))]
        title = "who (row) looks at whom (column)"
        figures["flow"] = matrix_figure(flow[rows][:, columns], named[0], named[1], title, folder / "flow.png")
    if "importance.rank_correlation" in tensors:
        values, names = tensors["importance.rank_correlation"].numpy(), header["importance_metrics"]
        if np.isfinite(values).any():
            title = "rank correlation of importance"
            figures["agreement"] = matrix_figure(values, names, names, title, folder / "agreement.png")
    return figures


def render_report(
    analysis: Analysis, picture: Image.Image, figures: Mapping[str, Path], *, title: str = "", footer: str = ""
) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "analysis.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    data = explorer_data(analysis, picture)
    return environment.get_template("analysis.html.j2").render(
        title=title or f"Attention of {analysis.header['model'] or 'a model'}",
        facts=facts(analysis.header),
        header=analysis.header,
        skipped=analysis.header.get("skipped", {}),
        lens=_lens(analysis),
        has_maps=data["maps"] is not None,
        has_measures=bool(data["measures"]),
        picture=picture_uri(picture),
        figures=[(name, Figure(path, CAPTIONS[name])) for name, path in figures.items()],
        data=Markup(script_safe(data)),
        script=Markup(script),
        script_hash=digest,
        footer=footer,
    )


def facts(header: Mapping[str, Any]) -> dict[str, str]:
    """Return a few short figures about the model and the run."""
    heads = sorted(set(header["heads"]))
    found = {"layers": str(header["layers"]), "heads": " to ".join(str(n) for n in {heads[0]: 0, heads[-1]: 0})}
    found["images"] = str(header["images"])
    if header["kind"] == "lmm":
        found["key-value heads"] = str(header["kv_heads"])
        if "sink_rate_first_token" in header:
            found["first token is a sink"] = f"{header['sink_rate_first_token']:.0f} %"
        if "neglect" in header:
            found["least attention to the image"] = (
                f"{header['neglect']['share']:.1%} in layer {header['neglect']['layer']}"
            )
        if "massive_layers" in header:
            found["layers with massive activations"] = _layers(header["massive_layers"])
    else:
        grid = header["grids"][0]
        found["patches"] = f"{grid[0]} x {grid[1]}"
        found["prefix tokens"] = str(header["prefix"][0])
    return found


def _layers(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))


def _lens(analysis: Analysis) -> list[tuple[int, list[tuple[str, str]]]]:
    """Return per layer the likeliest tokens and their probabilities, by the final norm and head."""
    if "lens" not in analysis.header:
        return []
    words = analysis.header["lens"]["norm_and_head"]
    chances = analysis.tensors["lens.norm_and_head.probability"].tolist()
    return [
        (layer, [(word, f"{chance:.1%}") for word, chance in zip(row, chances[layer], strict=True)])
        for layer, row in enumerate(words)
    ]
