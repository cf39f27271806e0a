"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from vislm.cli import main
from vislm.data.scenes import generate_scenes


@pytest.fixture
def vislm(monkeypatch, capsys):
    """Run a command in this process; return (exit code, stdout, stderr)."""

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


def test_ask(vislm, photo) -> None:
    code, out, err = vislm(
        "ask",
        photo,
        "Is there a dog in the image?",
        "--prune",
        "flowcut:keep=16",
        "--heads",
        "vhr:alpha=2",
        "--details",
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] in ("yes .", "no .")
    assert "64 -> 16" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask", "missing.png", "?"], 1, "missing.png: no such file"),
        (["ask", "PHOTO", "?", "--prune", "flowcutt"], 2, "did you mean 'flowcut'"),
        (["ask", "PHOTO", "?", "--prune", "flowcut:keeep=3"], 2, "did you mean 'keep'"),
        (["ask", "PHOTO", "?", "--prune", "flowcut:keep=0"], 2, "at least one visual token"),
        (["ask", "PHOTO", "?", "--prune", "random:keep=0"], 2, "at least one visual token must stay"),
        (["ask", "PHOTO", "?", "--prune", "flowcut:keep=8", "--prune", "random:keep=4"], 2, "positions"),
        (["ask", "PHOTO", "?", "--model", "nothing"], 1, "neither embedded"),
        (["ask", "PHOTO", "?", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["ask", "PHOTO"], 2, "Missing argument"),
        (["list", "prunig"], 2, "did you mean 'pruning'"),
        (["info", "flowcutt"], 2, "did you mean 'flowcut'"),
        (["verify", "missing"], 2, "not a folder"),
        (["visualize", "tokens", "PHOTO"], 2, "nothing to draw"),
        (["data", "scenes", "--out", "x", "--difficulty", "hardd"], 2, "did you mean 'hard'"),
        (["eval", "popee", "--data", "x", "--out", "y"], 2, "did you mean 'pope'"),
        (["eval", "pope", "--data", "nowhere", "--out", "y"], 1, "does not exist"),
        (["nonsense"], 2, "No such command"),
        (["eval", "pope", "--data", "x", "--out", "y", "--control", "gray"], 2, "did you mean 'grey'"),
    ],
)
def test_mistakes_end_in_one_clear_line(vislm, photo, tmp_path, monkeypatch, arguments, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = vislm(*[photo if a == "PHOTO" else a for a in arguments])
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(vislm) -> None:
    import sys as system

    from vislm.errors import ImageError

    system.argv = ["vislm", "--debug", "ask", "missing.png", "?"]
    with pytest.raises(ImageError):
        main()


def test_scenes_eval_and_resume(vislm, tmp_path) -> None:
    assert vislm("data", "scenes", "--n", 3, "--seed", 5, "--out", tmp_path / "d")[0] == 0
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["captions.json", "images", "instances.json"]
    for benchmark, key in (("pope", "adversarial"), ("chair", "CHAIR_i")):
        code, out, _ = vislm(
            "eval", benchmark, "--data", tmp_path / "d", "--out", tmp_path / benchmark, "--prune", "flowcut:keep=16"
        )
        assert code == 0
        assert key in out
        assert key in json.loads((tmp_path / benchmark / "results.json").read_text())["metrics"]
    code, _, err = vislm("eval", "pope", "--data", tmp_path / "d", "--out", tmp_path / "pope")
    assert code == 1
    assert "interventions" in err


def test_pictures(vislm, photo, tmp_path) -> None:
    assert (
        vislm(
            "visualize",
            "tokens",
            photo,
            "--prune",
            "flowcut:keep=16",
            "--prune",
            "fastv:keep=8",
            "--out",
            tmp_path / "t.png",
        )[0]
        == 0
    )
    assert vislm("visualize", "heads", photo, "--heads", "vhr:alpha=2", "--out", tmp_path / "h.png")[0] == 0
    for name in ("t.png", "h.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 150


def test_list_and_info(vislm) -> None:
    code, out, _ = vislm("list")
    assert code == 0
    for word in (
        "vislm-tiny",
        "llava_next",
        "flowcut",
        "fastv",
        "random",
        "vhr",
        "pope",
        "chair",
        "reference",
        "torch",
    ):
        assert word in out
    assert "alpha = 2.0  (float)" in vislm("info", "vhr")[1]
    assert "patch grid 8 x 8" in vislm("info", "vislm-tiny")[1]


def test_verify(vislm, tmp_path) -> None:
    from pathlib import Path

    folder = Path(__file__).parents[1] / "golden" / "vhr"
    code, out, _ = vislm("verify", folder)
    assert code == 0
    assert "4 passed, 0 failed, 0 unknown" in out
    rows = json.loads(vislm("verify", folder, "--json")[1])
    assert [r["status"] for r in rows] == ["pass"] * 4
    (tmp_path / "x.json").write_text(json.dumps({"meta": {"method": "telepathy"}}))
    code, out, _ = vislm("verify", tmp_path, "--json")
    assert code == 1
    assert json.loads(out)[0]["status"] == "unknown"


@pytest.mark.parametrize("code", ["import vislm", "import vislm.cli", "import vislm.data.scene_categories"])
def test_light_imports_load_nothing_heavy(code) -> None:
    names = "'torch', 'transformers', 'timm', 'matplotlib', 'xformers', 'numpy'"
    check = f"{code}\nimport sys\nheavy = {{{names}}} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True)


def test_import_does_not_load_optional_backends() -> None:
    check = "import vislm.lmm.model, sys\nassert not {'xformers', 'open_clip', 'natten'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
