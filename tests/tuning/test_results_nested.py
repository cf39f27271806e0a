"""A schedule of a method that holds other methods can be read back."""

from __future__ import annotations

import yaml

from vislm import FlowCut, registry
from vislm.token_pruning.divprune import DivPrune
from vislm.token_pruning.staged import Staged
from vislm.tuning.results import _plain


def test_methods_inside_a_method_survive_yaml(tmp_path) -> None:
    method = Staged(keep=16, tower=FlowCut(tower_keep=20), selection=DivPrune(newlines=False), overshoot=1.5)
    content = _plain(method)
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml.safe_dump(content))
    assert registry.build("pruning", str(path)) == method
