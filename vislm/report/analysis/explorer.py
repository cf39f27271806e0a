"""Data of the interactive page: maps as bytes, as many as fit, and the head maps to choose from."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from vislm.analysis.results import Analysis
from vislm.report.analysis.heatmaps import CLUSTERS, colour_range, is_clusters
from vislm.report.analysis.overlays import token_grid

LIMIT = 8 * 2**20
"""Bytes of maps on a page."""
_PICTURE = 640
_STOPS = 33


def explorer_data(analysis: Analysis, picture: Image.Image, limit: int = LIMIT) -> dict[str, Any]:
    """Return what the page's script reads (JSON)."""
    header = analysis.header
    return {
        "kind": header["kind"],
        "layers": header["layers"],
        "heads": header["heads"],
        "layerNames": header.get("names", []),
        "picture": {"width": picture.width, "height": picture.height},
        "maps": _maps(analysis, limit),
        "measures": [_measure(analysis, name, title) for name, title in header.get("measures", {}).items()],
        "colours": {name: _stops(name) for name in ("inferno", "viridis", "RdBu_r")} | {"clusters": list(CLUSTERS)},
    }


def picture_uri(picture: Image.Image) -> str:
    """Return the picture as a data URI, a small one enlarged in sharp pixels and a large one made smaller."""
    factor = _PICTURE / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    method = Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size, method).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def script_safe(data: Any) -> str:
    """Return JSON that may stand inside a ``<script>`` element, whatever its texts are."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _maps(analysis: Analysis, limit: int) -> dict[str, Any] | None:
    """Return the maps (queries, L, H, cells) as bytes with one scale per map; None where there are none to show."""
    grid = token_grid(analysis)
    if grid is None:
        return None
    found = _lmm_maps(analysis) if analysis.header["kind"] == "lmm" else _vit_maps(analysis)
    if found is None:
        return None
    values, queries = found
    if analysis.header["kind"] == "lmm":
        values = values[..., grid.index().flatten()]
    each = values[0].size
    if each * len(queries) > limit:
        chosen = _spread(queries, max(1, limit // each))
        values, queries = values[chosen], [queries[n] for n in chosen]
    values = np.nan_to_num(values.astype(np.float32))
    scale = values.max(-1)
    level = np.round(255.0 * values / np.maximum(scale, 1e-12)[..., None]).astype(np.uint8)
    return {
        "rows": grid.rows,
        "columns": grid.columns,
        "heads": values.shape[2],
        "queries": queries,
        "scale": base64.b64encode(scale.astype("<f4").tobytes()).decode("ascii"),
        "data": base64.b64encode(level.tobytes()).decode("ascii"),
    }


def _lmm_maps(analysis: Analysis) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    if "maps.image_rows" not in analysis.tensors:
        return None
    values = analysis.tensors["maps.image_rows"].float().numpy()
    masses = analysis.tensors["maps.masses"].float().numpy()
    groups = analysis.header["key_groups"]
    used = [n for n in range(len(groups)) if masses[..., n].max() > 0]
    tokens = analysis.header["tokens"]
    queries = [
        {
            "label": f"step {step}: the row that gave {token!r}",
            "short": token.strip() or repr(token)[1:-1],
            "masses": [[[_number(m) for m in head[used]] for head in layer] for layer in masses[step]],
            "groups": [groups[n].replace("_", " ") for n in used],
        }
        for step, token in enumerate(tokens)
    ]
    return values[: len(queries)], queries


def _vit_maps(analysis: Analysis) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    if not analysis.header["uniform_grid"]:
        return None
    grid, prefix = token_grid(analysis), analysis.header["prefix"][0]
    assert grid is not None
    names = ["class token", *(f"register {n}" for n in range(prefix - 1))][:prefix]
    queries: list[dict[str, Any]] = [{"label": name, "short": name} for name in names]
    if "maps.full" in analysis.tensors:
        values = analysis.tensors["maps.full"].float().numpy().transpose(2, 0, 1, 3)[..., prefix:]
        queries += [
            {"label": f"patch in row {n // grid.columns}, column {n % grid.columns}", "short": "", "cell": n}
            for n in range(grid.rows * grid.columns)
        ]
        return values, queries
    if "maps.prefix_rows" in analysis.tensors:
        return analysis.tensors["maps.prefix_rows"].float().numpy().transpose(2, 0, 1, 3)[..., prefix:], queries
    return None


def _spread(queries: list[dict[str, Any]], count: int) -> list[int]:
    """Return ``count`` places: all queries that are no patch as far as they fit, and the others evenly."""
    first = [n for n, query in enumerate(queries) if "cell" not in query]
    rest = [n for n, query in enumerate(queries) if "cell" in query]
    if not rest or count <= len(first):
        return [first[n * len(first) // min(count, len(first))] for n in range(min(count, len(first)))]
    left = count - len(first)
    return first + [rest[n * len(rest) // left] for n in range(left)]


def _measure(analysis: Analysis, name: str, title: str) -> dict[str, Any]:
    values = analysis.tensors[name].float().numpy()
    low, high, diverging = colour_range(values)
    return {
        "name": name,
        "title": title,
        "note": analysis.notes[name],
        "values": [[_number(v) for v in row] for row in values],
        "low": low,
        "high": high,
        "palette": "clusters" if is_clusters(name) else "RdBu_r" if diverging else "viridis",
        "tower": name.startswith("tower."),
    }


def _number(value: Any) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _stops(name: str) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[name](n / (_STOPS - 1))) for n in range(_STOPS)]
