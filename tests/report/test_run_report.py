"""``vislm report``: what the three files say about runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import ACCURACY, row, write_run

from vislm.errors import RunFolderError, UsageError
from vislm.report.runs.write import write_run_report

N = 24


def rows(wrong=(), **changes):
    return [row(n, n not in wrong, **changes) for n in range(N)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two comparable runs: B prunes, and errs on three more samples and on one fewer."""
    tmp_path = tmp_path_factory.mktemp("pair")
    kept = [{"of": 64, "index": [0, 9], "grid": [8, 8, 0, 8], "seen": [0.0, 0.0, 1.0, 1.0]}]
    a = write_run(tmp_path / "a", rows({0, 5}))
    b = write_run(
        tmp_path / "b",
        rows({5, 7, 8, 9}, kept=kept, visual_tokens_kept=2),
        config={"interventions": ["FlowCut(keep=2, layer=1)"]},
        results={"visual_tokens_kept": 2.0, "flops": 1e9, "milliseconds": 5.0},
    )
    return a, b


@pytest.fixture(scope="module")
def both(pair, tmp_path_factory):
    """The report about both runs, with three files."""
    return report(*pair, out=tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toyqa") / "data" / "images"
    folder.mkdir(parents=True)
    for n in range(N // 2):
        Image.new("RGB", (300, 200), (10 * n, 60, 90)).save(folder / f"{n:03d}.png")
    return folder.parent


class Page(HTMLParser):
    """What a test looks at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def of(self, kind: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == kind]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def report(*runs, out, **options) -> tuple[str, str, str]:
    paths = write_run_report(runs, out, resamples=200, **options)
    page, markdown, latex = (path.read_text(encoding="utf-8") for path in paths)
    return page, markdown, latex


def test_tables_hold_scores_errors_intervals_costs_and_settings(both) -> None:
    _, markdown, latex = both
    assert re.search(
        r"\| all tokens \| 0\.917 ± 0\.0\d\d \[0\.\d+, 1\.000\] \| 24 \| 64\.0 \| 2\.000 \| 10\.0 \|", markdown
    )
    assert re.search(r"\| FlowCut\(keep=2\) \| 0\.833 ± 0\.", markdown)
    assert "| suffix" not in markdown
    assert "| protocol.suffix | short |" in markdown
    assert "FlowCut(keep=2, layer=1)" in markdown
    assert "recall has no denominator" in markdown
    assert r"0.833 $\pm$ 0." in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\begin{table}") > 4
    assert r"95 \%" in latex


def test_differences_are_those_of_compare_and_flips_come_first(pair, tmp_path) -> None:
    from vislm.eval.compare import compare, read_run
    from vislm.eval.compare_tables import difference_rows, mcnemar_rows

    page, markdown, _ = report(*pair, out=tmp_path / "out", samples=6)
    found = compare(read_run(pair[0]), read_run(pair[1]), resamples=200)
    for line in [*difference_rows(found), *mcnemar_rows(found)]:
        assert "| " + " | ".join(map(str, line.values())) + " |" in markdown
    assert "4 of 24 samples have another score." in markdown
    shown = Page(page).of("article")
    flipped = ["data-flipped" in card for card in shown]
    assert len(shown) == 6
    assert flipped == sorted(flipped, reverse=True)
    assert 2 <= sum(flipped) <= 4


YES_NO = {
    "figures": [
        ACCURACY,
        {"name": "yes_ratio", "kind": "mean", "columns": ["answer"], "better": "neither"},
        {"name": "auroc", "kind": "auroc", "columns": ["label", "margin"], "better": "higher"},
    ]
}


def test_a_shift_of_the_threshold_is_noted(tmp_path) -> None:
    a = write_run(tmp_path / "a", rows(), results=YES_NO)
    eager = rows(range(0, N, 2))  # yes to everything, as well ranked as before
    for answer in eager:
        answer["values"]["margin"] = 1.0 + answer["values"]["label"]
    b = write_run(tmp_path / "b", eager, results=YES_NO)
    page, markdown, latex = report(a, b, out=tmp_path / "out")
    for words in (
        "A has the higher accuracy (+0.500), but not the higher AUROC (+0.000): the runs differ in the threshold",
        "The share of yes moves by 50.0 points (A 0.500, B 1.000), more than 10: accuracy alone shows no gain.",
    ):
        assert words in markdown
        assert words in page
        assert words in latex
    better = write_run(tmp_path / "c", rows(range(0, N, 6)), results=YES_NO)
    assert "threshold" not in "".join(report(a, better, out=tmp_path / "other")[1:])


def test_an_auroc_over_fewer_samples_says_so(tmp_path) -> None:
    partly = rows({0, 5})
    for answer in partly[8:]:
        del answer["values"]["margin"]
    markdown = report(write_run(tmp_path / "a", partly, results=YES_NO), out=tmp_path / "out")[1]
    assert "], n = 8 |" in markdown
    assert (markdown.count(", n = 8 |"), markdown.count(", n = 4 |")) == (2, 2)  # results and parts
    whole = report(write_run(tmp_path / "b", rows({0, 5}), results=YES_NO), out=tmp_path / "whole")[1]
    assert "n = " not in whole


def test_wrong_samples_come_first_and_right_ones_are_shown_too(tmp_path) -> None:
    run = write_run(tmp_path / "run", rows(set(range(0, N, 2))))
    page = Page(report(run, out=tmp_path / "out", samples=8)[0])
    states = [str(card["data-state"]) for card in page.of("article")]
    assert states == ["wrong"] * 6 + ["right"] * 2
    assert not Page(report(run, out=tmp_path / "none", samples=0)[0]).of("article")


def test_states(tmp_path) -> None:
    some = [
        row(0, answer=None, score=None),
        row(1, answer=None, score=0.0),
        row(2, score=None),
        row(3, score=0.3),
        row(4),
        row(5, False),
    ]
    page = Page(report(write_run(tmp_path / "run", some), out=tmp_path / "out")[0])
    found = [str(card["data-state"]) for card in page.of("article")]
    assert found == ["wrong", "unparsed", "unparsed", "partly", "uncounted", "right"]


def test_pictures_are_inside_once_and_kept_tokens_lie_over_them(pair, data, tmp_path) -> None:
    page, _, _ = report(*pair, out=tmp_path / "out", data=[str(data)], samples=N)
    assert page.count("data:image/jpeg;base64,") == N // 2
    parsed = Page(page)
    veils = [image for image in parsed.of("img") if image.get("class") == "veil"]
    assert len(veils) == N
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in veils)
    assert "2 of 64 tokens, FlowCut(keep=2)" in page
    assert "http" not in re.sub(r'base64,[^"]*', "", page).replace("http-equiv", "")


def test_without_data_the_page_shows_names(both) -> None:
    page, _, _ = both
    assert "data:image/jpeg" not in page
    assert '<p class="facts">000.png</p>' in page


def test_policy_allows_the_own_script_and_style_only(both) -> None:
    import base64
    import hashlib

    page, _, _ = both
    policy = next(str(m["content"]) for m in Page(page).of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("script", "style"):
        (body,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    names = {name for _, attributes in Page(page).tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} | {"style", "href"} & names


def test_plots_where_there_are_numbers_for_them(both, pair, tmp_path) -> None:
    images = Page(both[0]).of("img")
    captions = [str(image["alt"]) for image in images if str(image["src"]).startswith("data:image/svg+xml")]
    assert len(captions) == 4
    assert captions[0].startswith(
        "accuracy with its 95 % interval against what a sample cost: visual tokens left, GFLOP, ms"
    )
    one = Page(report(pair[0], out=tmp_path / "one")[0]).of("img")
    assert len([image for image in one if str(image["src"]).startswith("data:image/svg+xml")]) == 3


def test_other_protocols_stand_apart_with_the_reason(pair, tmp_path) -> None:
    other = write_run(tmp_path / "c", rows(), config={"protocol.suffix": "none"})
    _, markdown, _ = report(*pair, other, out=tmp_path / "out")
    assert "## toyqa (1)" in markdown
    assert "## toyqa (2)" in markdown
    assert "followed different protocols (protocol.suffix: 'short' and 'none')" in markdown


def test_three_runs_are_compared_with_the_first(pair, tmp_path) -> None:
    third = write_run(tmp_path / "c", rows({1}), config={"interventions": ["FlowCut(keep=4, layer=1)"]})
    _, markdown, _ = report(*pair, third, out=tmp_path / "out")
    assert "### all tokens against the others" in markdown
    assert "### all tokens against FlowCut(keep=4)" in markdown


def test_rows_of_vision_models(tmp_path) -> None:
    boxes = [
        {"id": str(n), "images": [f"{n}.jpg"], "group": str(n), "prompt": "", "text": "", "truth": None}
        | {"answer": [[1.0, 2.0, 3.00001, 4.0]], "score": None, "boxes": [[0.123456, 1, 2, 3]] * 200, "top": [[3, 0.5]]}
        | {"map": "eJx" * 50_000}
        for n in range(4)
    ]
    run = write_run(
        tmp_path / "run",
        boxes,
        config={"benchmark": "coco_detection"},
        results={"per_group": {}, "metrics": {"AP": 0.4}},
    )
    page, markdown, _ = report(run, out=tmp_path / "out")
    assert "top: [[3, 0.5]]" in page
    assert "0.1235" in page
    assert {str(card["data-state"]) for card in Page(page).of("article")} == {"uncounted"}
    assert len(page) < 60_000
    assert "| toy | 0.400 |" in markdown


def test_damaged_extras_do_not_break_a_report(tmp_path) -> None:
    deep = json.loads("[" * 200 + "]" * 200)
    odd = [
        row(0, kept=[{"of": 64, "index": [1], "grid": [1 << 20, 1 << 20, 0, 1]}], truth=deep),
        row(1, kept=[{"of": "x", "index": "y", "grid": [8, 8, 0, 8], "seen": [0, 0, 2, 2]}]),
        row(2, kept="no", images="no", prompt=None, seconds="slow"),
        row(3, images=[{"a": 1}, None], text="\ud800 half a character"),
    ]
    results = {"metrics": [1], "per_group": 3, "versions": None, "broken": "x", "visual_tokens_kept": float("nan")}
    page, markdown, latex = report(
        write_run(tmp_path / "run", odd, results=results), out=tmp_path / "out", data=[str(tmp_path)]
    )
    assert page.count("<article") == 4
    assert markdown
    assert latex


def test_broken_samples_are_named(tmp_path) -> None:
    broken = [{"id": f"id{n}", "error": "truncated file"} for n in range(25)]
    _, markdown, _ = report(write_run(tmp_path / "run", rows(), results={"broken": broken}), out=tmp_path / "out")
    assert "| toy | id0 | truncated file |" in markdown
    assert "and 5 more, see results.json" in markdown


def test_bad_input(pair, tmp_path) -> None:
    with pytest.raises(UsageError, match="no run folder"):
        write_run_report([], tmp_path / "out")
    with pytest.raises(UsageError, match="named twice"):
        write_run_report([pair[0], pair[0]], tmp_path / "out")
    with pytest.raises(RunFolderError, match="no run"):
        write_run_report([tmp_path], tmp_path / "out")
    with pytest.raises(UsageError, match="is not a folder"):
        write_run_report([pair[0]], tmp_path / "out", data=["nowhere"])
    assert not (tmp_path / "out").exists()


def test_the_same_runs_give_the_same_files(pair, data, tmp_path) -> None:
    first, second = (report(*pair, out=tmp_path / name, data=[str(data)], samples=8) for name in ("one", "two"))
    assert first == second


def test_figures_without_any_sample(tmp_path) -> None:
    auroc = {"name": "auroc", "kind": "auroc", "columns": ["label", "nothing"], "better": "higher"}
    run = write_run(tmp_path / "run", rows(), results={"figures": [auroc, ACCURACY]})
    assert "accuracy" in report(run, out=tmp_path / "out")[1]


def test_command(pair, tmp_path) -> None:
    from typer.testing import CliRunner

    from vislm.cli import app

    arguments = ["report", *map(str, pair), "--out", str(tmp_path / "out"), "--resamples", "100", "--title", "Two"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert "<h1>Two</h1>" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_the_package_is_light() -> None:
    code = (
        "import sys, vislm.report.runs.write; print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
