"""explain-prune, ask --stats, visualize tokens and bench pruning as a user types them."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from vislm.cli import main
from vislm.data.scenes import generate_scenes


@pytest.fixture
def vislm(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vislm", *map(str, arguments)])
        monkeypatch.delenv("VISLM_DEBUG", raising=False)
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    next(generate_scenes(1, 77)).image.save(path)
    return path


def test_explain_a_published_model(vislm) -> None:
    code, out, err = vislm("explain-prune", "--prune", "flowcut:keep=64", "--model", "llava-1.5-7b")
    assert (code, err) == (0, "")
    for part in ("576 visual tokens", "544 in layers 2-3", "8.45 TFLOP  1.61 TFLOP", "roofline", "estimate, not exact"):
        assert part in out


def test_explain_the_embedded_model_exactly(vislm, photo) -> None:
    code, out, _ = vislm(
        "explain-prune",
        "--prune",
        "divprune:keep=16",
        "--text-tokens",
        "13",
        "--value-bytes",
        "4",
        "--image-size",
        "64x64",
    )
    assert code == 0
    assert "estimate" not in out
    code, asked, _ = vislm("ask", photo, "Is there a dog in the image?", "--prune", "divprune:keep=16", "--stats")
    assert code == 0
    assert "as counted" in asked
    assert "decoder       29 in layers 0-3" in asked
    assert "29 in layers 0-3 (with 13 of text)" in out


def test_explain_without_methods(vislm) -> None:
    code, out, _ = vislm("explain-prune", "--model", "qwen2-vl-7b", "--image-size", "1280")
    assert code == 0
    assert "untouched" in out.splitlines()[0]
    assert "0 % of the FLOPs" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["explain-prune", "--model", "llava-1.5-70b"], 1, "llava-1.5-7b"),
        (["explain-prune", "--prune", "fastw"], 2, "did you mean 'fastv'"),
        (["explain-prune", "--image-size", "big"], 2, "--image-size 'big'"),
        (["explain-prune", "--prune", "fastv", "--prune", "fastv"], 2, "given twice"),
        (["visualize", "tokens", "--prune", "fastv"], 2, "--image photo.jpg"),
        (["visualize", "tokens", "--image", "PHOTO"], 2, "name a method"),
        (["bench", "pruning", "--keep", "half"], 2, "--keep 'half'"),
        (["bench", "pruning", "--methods", "fastw"], 2, "did you mean 'fastv'"),
        (["bench", "pruning", "--dtype", "int8"], 2, "bfloat16"),
    ],
)
def test_mistakes(vislm, photo, arguments, code, message) -> None:
    found, _, err = vislm(*[photo if argument == "PHOTO" else argument for argument in arguments])
    assert (found, message in err) == (code, True)


def test_visualize_tokens(vislm, photo, tmp_path) -> None:
    out = tmp_path / "tokens.png"
    methods = ["--prune", "flowcut:keep=16", "--prune", "tome:keep=16"]
    assert vislm("visualize", "tokens", "--image", photo, *methods, "--out", out, "--tower")[0] == 0
    with Image.open(out) as picture:
        wide = picture.width
    assert vislm("visualize", "tokens", photo, *methods[:2], "--out", out)[0] == 0
    with Image.open(out) as picture:
        assert picture.width < wide


def test_bench_pruning(vislm, tmp_path, monkeypatch) -> None:
    from vislm.bench.pruning import run

    seen = []
    monkeypatch.setattr(run, "pruning_lines", lambda bench, out: seen.append((bench, out)) or iter(["done"]))
    target = tmp_path / "p.json"
    code, out, _ = vislm(
        "bench",
        "pruning",
        "--tokens",
        2910,
        "--methods",
        "fastv,divprune",
        "--keep",
        "0.5",
        "--threads",
        1,
        "--json",
        target,
    )
    assert (code, out) == (0, "done\n")
    ((bench, path),) = seen
    assert (bench.tokens, bench.methods, bench.keeps, bench.threads, path) == (
        2910,
        ("fastv", "divprune"),
        (0.5,),
        1,
        target,
    )
    assert json.dumps(bench.sizes) == "{}"
