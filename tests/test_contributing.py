"""The method in CONTRIBUTING.md runs as it is printed there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

from vislm import load_lmm, registry
from vislm.data.scenes import generate_scenes

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_is_a_working_method(monkeypatch, tmp_path) -> None:
    import vislm.token_pruning as area

    (tmp_path / "first.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[0], encoding="utf-8")
    monkeypatch.setattr(area, "__path__", [*area.__path__, str(tmp_path)])
    assert isinstance(area, types.ModuleType)
    assert "first" in registry.names("pruning")
    lmm = load_lmm()
    with lmm.using(registry.build("pruning", "first:keep=10")):
        lmm.ask(next(generate_scenes(1, 1)).image, "is there a dog in the image ?")
    assert lmm.last_run is not None
    assert lmm.last_run.stages[0].index == [list(range(10))]
    sys.modules.pop("vislm.token_pruning.first")
