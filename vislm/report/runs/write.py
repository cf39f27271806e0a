"""Writing the report of finished runs: index.html, report.md and report.tex."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vislm.files import atomic_write
from vislm.report.latex import latex_table
from vislm.report.runs.bundle import Bundle, read_bundles
from vislm.report.runs.charts import charts
from vislm.report.runs.page import BundlePart, render
from vislm.report.runs.pictures import DataFolder, PictureFinder
from vislm.report.runs.samples import Album, cards
from vislm.report.runs.scores import measure
from vislm.report.runs.tables import tables
from vislm.report.tables import Rows, markdown_table

PAGE, MARKDOWN, LATEX = "index.html", "report.md", "report.tex"


def write_run_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    data: Sequence[str] = (),
    samples: int = 120,
    title: str = "Evaluation",
    resamples: int = 2000,
) -> list[Path]:
    """Write a report about one or more run folders; return the paths of the page, the Markdown and the LaTeX file.

    Runs on the same samples stand side by side; the others are compared with the first one named.

    Args:
        folders: what ``vislm eval`` wrote.
        out: folder for the report.
        data: where pictures lie, each ``FOLDER`` or ``BENCHMARK[:OPTION=VALUE,...]=FOLDER``; nothing outside is opened.
        samples: how many samples of each benchmark the page shows.
        title: headline.
        resamples: draws of the bootstrap.

    Raises:
        RunFolderError: a folder that holds no finished run.
        UsageError: no folder, one named twice, or a data folder that does not exist.
    """
    places = [DataFolder.parse(text) for text in data]
    bundles = read_bundles(folders)
    album, parts = Album(), []
    for bundle, name in zip(bundles, _titles(bundles), strict=True):
        finder = PictureFinder(bundle.name, places)
        shown = cards(bundle, samples, finder, album)
        scores = measure(bundle, resamples)
        found, drawn = tables(bundle, scores), charts(bundle, scores)
        total = len(bundle.runs[0].rows)
        parts.append(BundlePart(name, _lead(bundle), found, drawn, shown, total, list(finder.notes)))
    folder = Path(out)
    texts = {
        PAGE: render(title, parts, album, footer=_footer(bundles)),
        MARKDOWN: markdown(title, parts),
        LATEX: latex(parts),
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))  # a model may answer half a character
    return [folder / name for name in texts]


def markdown(title: str, parts: Sequence[BundlePart]) -> str:
    """Return all tables in Markdown; nothing in a cell can be HTML or a link."""
    blocks = [f"# {_harmless(title)}"]
    for part in parts:
        blocks += [f"## {_harmless(part.title)}", _harmless(part.lead)]
        for named in part.tables:
            blocks += [f"### {_harmless(named.title)}", markdown_table(_harmless_rows(named.rows))]
            blocks += [_harmless(named.note)] if named.note else []
    return "\n\n".join(blocks) + "\n"


def latex(parts: Sequence[BundlePart]) -> str:
    r"""Return all tables in LaTeX, ready for ``\input``."""
    blocks = ["% \\usepackage{booktabs}"]
    for number, part in enumerate(parts, start=1):
        for place, named in enumerate(part.tables, start=1):
            caption = f"{part.title}: {named.title}. {named.note}".strip()
            blocks.append(latex_table(named.rows, caption=caption, label=f"tab:vislm-{number}-{place}"))
    return "\n\n".join(blocks) + "\n"


def _lead(bundle: Bundle) -> str:
    first = bundle.runs[0]
    runs = "one run" if len(bundle.runs) == 1 else f"{len(bundle.runs)} runs, A = {bundle.labels[0]}"
    control = "" if first.config.get("control", "none") == "none" else f", control: {first.config['control']}"
    apart = f" Apart from the runs above: {bundle.apart}." if bundle.apart else ""
    return f"{len(first.rows)} samples, {runs}{control}.{apart}"


def _titles(bundles: Sequence[Bundle]) -> list[str]:
    """Return the names of the benchmarks, numbered where one occurs in several bundles."""
    names = [bundle.name for bundle in bundles]
    return [n if names.count(n) == 1 else f"{n} ({names[: k + 1].count(n)})" for k, n in enumerate(names)]


def _footer(bundles: Sequence[Bundle]) -> str:
    folders = ", ".join(str(run.folder) for bundle in bundles for run in bundle.runs)
    return f"Written by vislm report from {folders}. The page needs no network; nothing but its own script can run."


def _harmless_rows(rows: Rows) -> Rows:
    return [{_harmless(k): _harmless(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]


def _harmless(text: str) -> str:
    """Return text that Markdown shows as it is, as far as HTML, links and code are concerned; on one line."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "&#96;")
    return line.replace("](", "]&#40;").replace("![", "!&#91;").replace("]:", "]&#58;").replace("][", "]&#91;")
