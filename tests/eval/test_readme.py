"""Every command of the evaluation page is one that the program accepts; every reference to an option exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vislm.cli import app
from vislm.eval.benchmarks import LMM_BENCHMARKS, options, read_options
from vislm.eval.prompts import SUFFIXES
from vislm.eval.specs import name_of

PAGE = Path(__file__).parents[2] / "vislm" / "eval" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = TEXT.split("\n## ")
COMMAND = re.compile(r"^ {4}((?:vislm|accelerate) .*)$|`(vislm eval [^`]* --out [^`]*)`", re.M)


def commands(text: str) -> list[str]:
    """Return the commands of a text: those on lines of their own, and whole runs between backticks."""
    return [own or inline for own, inline in COMMAND.findall(text)]


LINES = commands(TEXT)


def parsed(line: str) -> tuple[str, dict]:
    """Return the command's name and its parameters, read as the program reads them."""
    words = shlex.split(line)
    words = ["eval", *words[words.index("vislm.eval") + 1 :]] if words[0] == "accelerate" else words[1:]
    command: Any = typer.main.get_command(app)
    name = ""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return name, command.make_context(name, words).params


@pytest.mark.parametrize("line", LINES)
def test_commands_are_accepted(line) -> None:
    name, found = parsed(line)
    for spec in found.get("benchmarks") or [found["benchmark"]] if name in ("eval", "check") else ():
        read_options(name_of(spec), spec.partition(":")[2])


def test_every_lmm_benchmark_has_a_command() -> None:
    runs = [found["benchmarks"] for name, found in map(parsed, LINES) if name == "eval"]
    assert {name_of(spec) for specs in runs for spec in specs} >= LMM_BENCHMARKS.keys()


def test_wrong_commands_are_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --outt"):
        parsed("vislm eval pope --data x --outt y")
    with pytest.raises(Exception, match="Missing parameter: data"):
        parsed("vislm eval pope --out y")


def test_options_in_the_text_exist() -> None:
    specs = re.findall(r"`(\w+):([\w,=.*-]+)`", TEXT)
    assert len(specs) >= 5
    for name, text in specs:
        assert read_options(name_of(name), text), f"{name}:{text}"
    for section in SECTIONS[2:]:
        names = {name_of(spec) for line in commands(section) for spec in parsed(line)[1].get("benchmarks", ())}
        if names <= LMM_BENCHMARKS.keys():  # the others speak of their models' options, too
            known = {option for name in names for option in options(name)}
            assert set(re.findall(r"`(\w+)=[^`]*`", section)) <= known, section.splitlines()[0]


def test_suffixes_are_quoted_as_they_are() -> None:
    for suffix, text in SUFFIXES.items():
        assert not text or f"`{suffix}` = {json.dumps(text)}" in TEXT.replace("\n", " "), suffix
