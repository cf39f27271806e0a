"""The README's Python and its commands run as they stand there, one after the other."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from vislm.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that sees the repository's configs and tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_python(here, capsys) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))
    exec(compile(code, "README.md", "exec"), {})
    assert "[16]" in capsys.readouterr().out


def test_commands(here, monkeypatch, capsys) -> None:
    block = TEXT.split("## On the command line")[1].split("```")[1]
    lines = [line for line in block.splitlines() if line.startswith("vislm ")]
    assert len(lines) == 13
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0, f"{line}: {capsys.readouterr()}"
    assert (here / "tokens.png").is_file()
    assert (here / "runs" / "flowcut16" / "results.json").is_file()
    assert (here / "runs" / "report" / "index.html").is_file()


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
