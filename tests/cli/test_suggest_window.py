"""``vislm suggest-window`` as a user types it."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from vislm.cli._sizes import parse_sizes, sizes_text
from vislm.cli.suggest_window import suggest_window
from vislm.errors import UnknownName, UsageError


def run(line: str) -> list[str]:
    app = typer.Typer()
    app.command()(suggest_window)
    result = CliRunner().invoke(app, line.split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_the_wanted_window_comes_first() -> None:
    lines = run("--grid 56x56 --window 7x7")
    assert lines[0] == "grid 56x56, tiles of 8x8 queries and 8x8 keys"
    assert lines[3].split() == ["7x7", "1x1", "64.00", "6.65", "12.25", "no"]
    assert lines[4].split() == ["8x8", "8x8", "49.00", "49.00", "49.00", "fully"]
    assert "no whole number of key tiles 8x8" in lines[6]


def test_published_case_with_unequal_tiles() -> None:
    lines = run("--grid 30x48x80 --window 18x24x24 --tiles 4x8x8 --key-tiles 2x8x8 --strides 1 --windows 2")
    assert [line.split() for line in lines[3:6]] == [
        ["18x24x24", "1x1x1", "11.11", "4.92", "6.21", "no"],
        ["18x24x24", "16x8x8", "11.11", "10.42", "10.42", "fully"],
        ["16x24x24", "4x8x8", "12.50", "11.72", "11.72", "fully"],
    ]
    assert lines[-1].endswith("more: --windows, --strides")


def test_dynamic_keys_and_dilation() -> None:
    lines = run("--grid 64 --window 16 --tiles 8 --tiling dynamic --dilation 2 --reach 0")
    assert [line.split()[:2] for line in lines[3:-1]] == [["16", "1"], ["16", "8"], ["16", "16"]]
    assert lines[4].split()[-1] == "fully"


def test_nothing_to_propose() -> None:
    lines = run("--grid 16 --window 3")
    assert len(lines) == 7
    assert "try other --tiles" in lines[-1]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("--grid 56by56 --window 7", UsageError, "--grid '56by56', expected whole numbers joined by x"),
        ("--grid 56x56 --window 7x7x7", UsageError, "--window 7x7x7 has 3 axes, the grid has 2"),
        ("--grid 56x56 --window 57", UsageError, "larger than axis 0"),
        ("--grid 56x56 --window 0", UsageError, "window"),
        ("--grid 56x56 --window 7 --tiles 0", UsageError, "query_tile"),
        ("--grid 2x3x4x5 --window 2", UsageError, "grid"),
        ("--grid 56x56 --window 7 --tiling static2", UnknownName, "did you mean 'static'"),
    ],
)
def test_mistakes(line, error, message) -> None:
    with pytest.raises(error, match=message):
        run(line)


def test_sizes() -> None:
    assert parse_sizes("--grid", " 30x48x80 ") == (30, 48, 80)
    assert parse_sizes("--window", "7", 2) == (7, 7)
    assert sizes_text((30, 48)) == "30x48"
