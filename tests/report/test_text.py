"""Units, run lines and tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vislm.lmm.interventions import Kept
from vislm.lmm.run import Run
from vislm.report.run_table import run_lines
from vislm.report.tables import markdown_table, metrics_table, text_table
from vislm.report.units import bytes_text, flops_text, milliseconds_text, percent_text, spans_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (flops_text(0), "0 FLOP"),
        (flops_text(999), "999 FLOP"),
        (flops_text(1.198e12), "1.20 TFLOP"),
        (bytes_text(1023), "1023 B"),
        (bytes_text(5 * 1024**2), "5.00 MiB"),
        (milliseconds_text(0.0123), "12.3 ms"),
        (percent_text(None), "-"),
        (percent_text(0.425), "42 %"),
        (spans_text([75, 75, 27, 27, 3]), "75 in layers 0-1, 27 in layers 2-3, 3 in layer 4"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


@given(st.integers(0, 10**18))
def test_prefixes_keep_the_magnitude(count: int) -> None:
    number, unit = flops_text(count).split(" ")
    factor = {"FLOP": 1, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(count, rel=0.006)


def test_every_aspect_of_a_run_has_its_line() -> None:
    factors = torch.tensor([[1.5, 1.0, 1.0], [1.5, 2.0, 1.0]])
    run = Run(
        batch=2,
        visual_tokens=[64, 64],
        stages=[Kept("prompt", [list(range(16)), list(range(8))])],
        tower_tokens=[64, 64, 16],
        layer_tokens=[27, 27],
        kv_bytes=2048,
        new_tokens=1,
        head_factors={0: torch.ones(2, 3), 3: factors},
        seconds={"tower": 0.1, "prefill": 0.2, "decode": 0.005},
        flops={"tower": 10, "prefill": 10, "full_tower": 20, "full_prefill": 20},
    )
    lines = {line[:14].strip(): line[14:] for line in run_lines(run)}
    assert lines == {
        "visual tokens": "image 1: 64 -> 16, image 2: 64 -> 8",
        "tower": "64 in layers 0-1, 16 in layer 2",
        "decoder": "27 in layers 0-1",
        "FLOPs": "tower 10 FLOP of 20 FLOP, prefill 10 FLOP of 20 FLOP (50 % of the full run)",
        "KV cache": "2.00 KiB",
        "time": "tower 100 ms, prefill 200 ms, decode 5.00 ms (1 step)",
        "heads": "layer 3: 0 (x1.5, 2/2), 1 (x2, 1/2)",
    }


def test_untouched_aspects_have_no_line() -> None:
    assert run_lines(Run()) == []
    assert run_lines(Run(head_factors={1: torch.ones(1, 4)})) == ["heads         none scaled"]


def test_columns_align() -> None:
    rows = [{"name": "a", "n": 1, "share": "9 %"}, {"name": "longer", "n": 1000, "share": "-"}, {"name": "b"}]
    assert text_table(rows).splitlines() == [
        "name       n  share",
        "------  ----  -----",
        "a          1    9 %",
        "longer  1000      -",
        "b",
    ]
    assert text_table(rows, ["n"]).splitlines()[0] == "   n"


@given(st.lists(st.text(alphabet="a|\\\n<>", max_size=6), min_size=1, max_size=4))
def test_markdown_cells_stay_in_their_cell(texts: list[str]) -> None:
    lines = markdown_table([{"one": text, "two": 1} for text in texts]).splitlines()
    assert len(lines) == 2 + len(texts)
    for line in lines:
        unescaped = line.replace("\\\\", "").replace("\\|", "")
        assert unescaped.count("|") == 3


def test_metrics_with_nested_groups() -> None:
    text = metrics_table(
        {
            "benchmark": "pope",
            "n": 6,
            "metrics": {"CHAIR_i": 0.25, "random": {"accuracy": 0.5, "warnings": ["none"]}, "oracles": {"random": {}}},
            "per_group": {"dog": {"n": 3, "accuracy": 1.0}},
        }
    )
    assert text.startswith("pope: 6 samples\n")
    assert "MISSING" not in text
    assert "CHAIR_i  0.250" in text
    assert "random     0.500" in text
    assert "warnings" not in text
    assert "dog    3     1.000" in text
