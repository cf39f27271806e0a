"""``vislm visualize attention``."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from vislm.cli import main


@pytest.fixture
def vislm(tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder with a picture; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save("photo.jpg")

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["vislm", "visualize", "attention", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_a_picture_is_drawn(vislm, tmp_path) -> None:
    code, output, _ = vislm(
        *("--model", "van_b0", "--image", "photo.jpg", "--size", "64x96", "--stage", "0", "--block", "-1"),
        *("--query", "3,4", "--query", "50%,99%", "--out", "new/a.png"),
    )
    assert (code, output) == (0, "written to new/a.png\n")
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.format == "PNG"


def test_heads_and_models_of_timm(vislm, tmp_path) -> None:
    code, output, _ = vislm(
        *("--model", "vit_tiny_patch16_224", "--image", "photo.jpg", "--size", "32", "--block", "2", "--head", "1")
    )
    assert (code, output) == (0, "written to attention.png\n")
    assert (tmp_path / "attention.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--query", "16,0"), 2, "query 16,0 is outside of the grid of 16 x 16 patches"),
        (("--query", "here"), 2, "query 'here', expected row and column of a patch"),
        (("--stage", "4"), 2, "stage=4, expected one of 0, 1, 2, 3"),
        (("--block", "9"), 2, "block=9, expected one of 0, 1, 2"),
        (("--head", "0"), 2, "large-kernel attention has no heads"),
        (("--size", "big"), 2, "--size 'big', expected whole numbers joined by x"),
        (("--pretrained",), 2, "van_b0 has no weights to download"),
        (("--weights", "none.safetensors"), 1, "cannot read none.safetensors"),
        (("--image", "none.jpg"), 1, "cannot use image none.jpg: no such file"),
        (("--model", "van_b9"), 2, "did you mean"),
    ],
)
def test_mistakes(vislm, tmp_path, arguments, code, message) -> None:
    given = {"--model": "van_b0", "--image": "photo.jpg", "--size": "64"}
    pairs = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    ended, _, errors = vislm(*pairs, *arguments)
    assert ended == code
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "attention.png").exists()
