"""Scripts and paths in captions, answers, names, questions, settings: a report shows them as text and opens nothing.

python reports.py
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from outcome import Outcome, Stopwatch, in_own_process

PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)>",
    "<body onload=alert(1)>",
    "<a href='javascript:alert(1)'>a</a>",
    '<a href="data:text/html,<script>alert(1)</script>">a</a>',
    "<link rel=stylesheet href=//evil.example/a.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<form action=//evil.example><input name=a></form>",
    "<object data=//evil.example></object>",
    "<embed src=//evil.example>",
    "<style>@import '//evil.example/a.css';</style>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</td></table><script>alert(1)</script>",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "{{ 7*7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;<script>alert(1)</script>",
    "<ScRiPt\n>alert(1)</sCrIpT\t>",
    "<details open ontoggle=alert(1)>",
    "\u2028<script>alert(1)</script>\0",
    r"\input{/etc/passwd}\write18{ls}$x_{1}^{2}$%",
)


COMPOSED = 40
"""Pages whose every text is another random mixture of payloads."""
DRAWN = 6
"""Pages whose plots are looked into as well."""


def trial() -> Outcome:
    """Put payloads into every place of two kinds of pages that takes text, and bad names where pictures are named."""
    watch = Stopwatch()
    found = in_own_process("reports.py")
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    cases = found.pop("cases", 0)
    return Outcome("scripts and file names in a report's texts", cases, found, watch.seconds, failures)


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        plain, of_plain = _plain_pages()
        runs, of_runs = _run_pages(Path(scratch))
        paths, of_paths = _picture_names(Path(scratch))
    counts = {"texts in places": of_plain + of_runs, "file names": of_paths}
    failures = plain + runs + paths
    found = {"anything but text": len(plain) + len(runs), "pictures or files from outside": len(paths)}
    return {"cases": sum(counts.values()), **counts, **found, "failures": failures}


def _plain_pages() -> tuple[list[str], int]:
    from vislm.report.page import Facts, Section, Table, Text, render_page

    def page(text: str) -> str:
        table = Table([{text: text, "number": 1}], caption=text)
        section = Section(text, [Text(text), table, Facts({text: text})])
        return render_page(text, [section, Section(text)], lead=text, footer=text)

    expected = _structure(page("harmless"))
    failures = [f"{p!r} changes the plain page" for p in PAYLOADS if _structure(page(p)) != expected]
    failures += [f"{p!r} is evaluated" for p in PAYLOADS if "{{ 7*7 }}" in p and "{{ 7*7 }}" not in page(p)]
    return failures, 9 * len(PAYLOADS)


class _Words:
    """Gives every place its text and counts the places."""

    def __init__(self, payloads: list[str]) -> None:
        self.payloads, self.given = payloads, 0

    def __call__(self) -> str:
        self.given += 1
        return f"{self.payloads[self.given % len(self.payloads)]} {self.given}"


def _run_pages(scratch: Path) -> tuple[list[str], int]:
    rng = random.Random(0)
    mixtures = [["".join(rng.choices(PAYLOADS, k=rng.randint(1, 4))) for _ in range(30)] for _ in range(COMPOSED)]
    harmless, _ = _run_report(scratch / "harmless", _Words(["word"]), drawn=False)
    expected, failures, cases = _structure(harmless["index.html"]), [], 0
    for number, payloads in enumerate([[p] for p in PAYLOADS] + mixtures):
        texts, count = _run_report(scratch / f"run{number}", _Words(payloads), drawn=number % 12 < 1)
        cases += count
        page = texts["index.html"]
        page, pictures = _without_plots(page)
        failures += [f"page {number}: {payloads[0]!r} changes it"] if _structure(page) != expected else []
        failures += [
            f"page {number}: {fault}" for fault in _links(page) + [f for svg in pictures for f in _in_svg(svg)]
        ]
        failures += [f"report.md {number}: {payloads[0]!r}"] if re.search(r"<|\]\(", texts["report.md"]) else []
        commands = set(re.findall(r"\\([A-Za-z]+|.)", texts["report.tex"])) - _COMMANDS
        failures += [f"report.tex {number}: {commands}"] if commands else []
    return failures, cases


_COMMANDS = {*"#$%&_{}\\", "begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule", "pm"}
_COMMANDS |= {"dots", "usepackage"}
_COMMANDS |= {f"text{n}" for n in ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "asciigrave")}


def _run_report(folder: Path, word: _Words, drawn: bool) -> tuple[dict[str, str], int]:
    """Return the files about two runs all of whose texts are the given words; plots, which take time, on demand."""
    from vislm.report.runs import write

    title, images = word(), [word(), word()]
    first = _run(folder / "a", word, images)
    second = _run(folder / "b", word, images, first)
    charts = write.charts
    if not drawn:
        write.charts = lambda *_: []
    try:
        paths = write.write_run_report([first, second], folder / "out", title=title, resamples=10)
    finally:
        write.charts = charts
    return {path.name: path.read_text(encoding="utf-8") for path in paths}, word.given


def _run(folder: Path, word: _Words, images: list[str], like: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    if like is not None:
        rows = [json.loads(line) for line in (like / "predictions.jsonl").read_text().splitlines()]
        rows = [{**row, "text": word(), "answer": word(), "score": 1.0 - row["score"]} for row in rows]
        config, results = (json.loads((like / name).read_text()) for name in ("run.json", "results.json"))
        config = {**config, "model": word(), "interventions": [f"A({word()})", word()]}
    else:
        parts, group, value, extra = [word(), word()], word(), word(), word()
        rows = [
            {"id": word(), "images": images, "group": group, "prompt": word(), "text": word(), "answer": word()}
            | {"truth": [word(), {word(): word()}], "score": float(n % 2), "parts": parts, extra: word()}
            | {"values": {value: 1.0, "label": float(n % 2), "margin": 1.0}, "visual_tokens": word()}
            for n in range(4)
        ]
        named = word()
        config = {
            "model": word(),
            "interventions": [],
            "benchmark": named,
            f"protocol.{word()}": word(),
            word(): word(),
        }
        figure = {"name": word(), "kind": "mean", "columns": ["score"], "better": "higher"}
        metrics = {word(): 1, word(): {word(): 0.5, "warnings": [word()]}}
        groups = {word(): {word(): 0.5}, word(): {word(): 1.0}}
        results = {"benchmark": named, "metrics": metrics, "per_group": groups, "figures": [figure]}
        results |= {"broken": [{"id": word(), "error": word()}], "versions": {word(): word()}, "n_unparsed": word()}
        results |= {"visual_tokens_kept": 8.0, "started": word()}
    results = {**results, "visual_tokens_kept": results["visual_tokens_kept"] / 2}
    (folder / "run.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _without_plots(page: str) -> tuple[str, list[str]]:
    """Return the page as it is without plots, and the plots as SVG."""
    import base64

    pictures = [base64.b64decode(p).decode() for p in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]*)", page)]
    page = re.sub(r'<h3>Plots</h3>\n<div class="charts">.*?</figure>\n</div>\n', "", page, flags=re.DOTALL)
    return page, pictures


_DRAWN = {"svg", "metadata", "RDF", "Work", "type", "format", "creator", "Agent", "title", "defs", "style", "g", "path"}
_DRAWN |= {"use", "text", "tspan", "clipPath", "rect"}


def _in_svg(picture: str) -> list[str]:
    """Return what a plot should not hold."""
    try:
        elements = list(ElementTree.fromstring(picture).iter())
    except ElementTree.ParseError as error:
        return [f"a plot is no XML: {error}"]
    found = [e.tag for e in elements if e.tag.rpartition("}")[2] not in _DRAWN]
    attributes = [(k.rpartition("}")[2].lower(), v) for e in elements for k, v in e.attrib.items()]
    found += [k for k, v in attributes if k.startswith("on") or (k == "href" and not v.startswith("#"))]
    return [f"a plot holds {name}" for name in found]


def _picture_names(scratch: Path) -> tuple[list[str], int]:
    """Name pictures outside the data folder in rows, plainly and behind links, and report; nothing may be opened."""
    from PIL import Image

    from vislm.report.runs.pictures import DataFolder, PictureFinder

    secret, data = scratch / "secret.png", scratch / "data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(secret)
    (data / "link.png").symlink_to(secret)
    (data / "images" / "up").symlink_to(scratch)
    (data / "images" / "loop.png").symlink_to("loop.png")
    opened: list[str] = []
    watched = {str(secret), "/etc/passwd"}
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if _is_open(event, args, watched) else None)
    shown, cases = [], 0
    for name in [*_outside(secret), *_mutated(secret, 400)]:
        finder = PictureFinder("toy", [DataFolder(data)])
        pictures = finder.find({"id": "1", "images": [name]})
        cases += 1
        shown += [f"{name!r} is shown"] if pictures != [None] else []
    return shown + [f"{path} was opened" for path in opened], cases


def _is_open(event: str, args: tuple, watched: set[str]) -> bool:
    if event != "open" or not isinstance(args[0], (str, bytes)) or "\0" in str(args[0]):
        return False
    return str(Path(str(args[0])).resolve()) in watched


def _outside(secret: Path) -> list[str]:
    names = ["../secret.png", "../../secret.png", "./../secret.png", "a/../../secret.png", "images/../../secret.png"]
    names += ["..", "../", "....//..//secret.png/..", "..\\secret.png", "a\\..\\..\\secret.png", "C:secret.png"]
    names += ["C:\\secret.png", "\\\\host\\share\\secret.png", "//host/share/secret.png", str(secret), "/etc/passwd"]
    names += [
        "../../../../../../../../etc/passwd",
        "a\0/../../secret.png",
        "\0",
        "",
        "x" * 5000,
        "\ud800.png",
        "~/a.png",
    ]
    return [
        *names,
        "link.png",
        "images/up/secret.png",
        "up/secret.png",
        "up/up/secret.png",
        "loop.png",
        f"file://{secret}",
    ]


def _mutated(secret: Path, count: int) -> list[str]:
    rng = random.Random(1)
    pieces = [
        "..",
        ".",
        "images",
        "up",
        "link.png",
        "secret.png",
        "etc",
        "passwd",
        "data",
        "",
        str(secret),
        "a\0",
        "\u2024",
    ]
    return [rng.choice(["/", "\\", "//"]).join(rng.choices(pieces, k=rng.randint(2, 6))) for _ in range(count)]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "style")]


def _structure(page: str) -> list[tuple[str, tuple[str, ...]]]:
    parser = _Tags()
    parser.feed(page)
    return parser.found


def _links(page: str) -> list[str]:
    """Return addresses that lead anywhere but into the page."""
    parser = _Tags()
    parser.feed(page)
    return [
        f"{a!r} leads out" for a in parser.links if not a.startswith(("data:image/png;", "data:image/svg", "#part-"))
    ]


if __name__ == "__main__":
    print(json.dumps(main()))
