"""The examples in CONTRIBUTING.md run as they are printed there."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

from vislm import load_lmm, registry
from vislm.attention import attention_class, attention_names
from vislm.backbones import ViTConfig, build
from vislm.catalog import SECTIONS
from vislm.data.scenes import generate_scenes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_is_a_working_method(monkeypatch, tmp_path) -> None:
    import vislm.token_pruning as area

    (tmp_path / "first.py").write_text(blocks("python", "Add a pruning")[0], encoding="utf-8")
    monkeypatch.setattr(area, "__path__", [*area.__path__, str(tmp_path)])
    assert isinstance(area, types.ModuleType)
    assert "first" in registry.names("pruning")
    lmm = load_lmm()
    with lmm.using(registry.build("pruning", "first:keep=10")):
        lmm.ask(next(generate_scenes(1, 1)).image, "is there a dog in the image ?")
    assert lmm.last_run is not None
    assert lmm.last_run.stages[0].index == [list(range(10))]
    sys.modules.pop("vislm.token_pruning.first")


def blocks(language: str, section: str) -> list[str]:
    """Return the blocks of code in the section whose title starts so."""
    (text,) = (part for part in TEXT.split("\n## ") if part.startswith(section))
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def documented(page: str) -> set[str]:
    """Return the names in the first column of the table in front of the page's first section."""
    cells = re.findall(r"^\| (`[^|]*)\|", page.split("\n## ")[0], re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_attention_has_its_row() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert documented(page) == set(attention_names())


@pytest.fixture
def axial(monkeypatch, tmp_path) -> Path:
    """Put the example among the attentions, and its test beside it."""
    import vislm.attention as area

    module, test = blocks("python", "Add an attention")
    (tmp_path / "axial.py").write_text(module, encoding="utf-8")
    (tmp_path / "checked").mkdir()
    (tmp_path / "checked" / "test_axial.py").write_text(test, encoding="utf-8")
    monkeypatch.setattr(area, "__path__", [*area.__path__, str(tmp_path)])
    yield tmp_path / "checked" / "test_axial.py"
    sys.modules.pop("vislm.attention.axial")


def test_the_attention_is_found_and_its_own_test_passes(axial) -> None:
    assert "axial" in attention_names()
    names = dict(SECTIONS["attentions"]())
    assert names["axial"].startswith("Axial attention: half of the heads")
    spec = importlib.util.spec_from_file_location("test_axial", axial)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [entry for name, entry in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_the_attention_is_a_mixer_of_backbones(axial) -> None:
    for mixer in ("axial", attention_class("axial")):
        model = build(ViTConfig(dim=8, depth=1, num_heads=2, mixer={"name": mixer}))
        assert isinstance(model.blocks[0].attn, attention_class("axial"))


def test_its_row_is_a_row_of_the_page(axial) -> None:
    (row,) = blocks("markdown", "Add an attention")
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    last = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("| `")][-1]
    assert documented(page.replace(last, f"{last}\n{row.strip()}")) == set(attention_names())
    assert row.count("|") == last.count("|")
