"""Tables in LaTeX: nothing in a cell is a command."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.report.latex import latex_escape, latex_table

SAFE = re.compile(
    r"(?:[^\\{}$&#%_~^<>|\"`\x00-\x1f\x7f-\x9f]|\\[{}$&#%_]|\\text[a-z]+\{\}|\\dots\{\}|\$\\pm\$|'')*", re.DOTALL
)


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from('\\{}$&#%_~^<>|"`\n\0±…'))))
def test_only_known_commands_are_left(text) -> None:
    assert SAFE.fullmatch(latex_escape(text))


def test_escapes() -> None:
    assert latex_escape(r"\input{x} 50% a_b") == r"\textbackslash{}input\{x\} 50\% a\_b"
    assert latex_escape("0.5 ± 0.1\n[0.4]") == r"0.5 $\pm$ 0.1 [0.4]"


def test_table() -> None:
    table = latex_table([{"run": "a&b", "x": 0.5}, {"run": "[1]", "x": None}], caption="50%", label="tab:a")
    assert table.splitlines()[:7] == [
        r"\begin{table}[htbp]",
        r"\centering",
        r"\caption{50\%}",
        r"\label{tab:a}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"run & x \\",
    ]
    assert r"a\&b & 0.500 \\" in table
    assert r"{[}1] &  \\" in table
    assert table.count(r"\\") == 3


def test_label_is_checked() -> None:
    with pytest.raises(ValueError, match="label"):
        latex_table([{"a": 1}], label="a}b")
