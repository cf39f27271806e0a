"""Methods by name, options by type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vislm import VHR, FlowCut, registry
from vislm.errors import UnknownName, UsageError


def test_methods_are_found_by_their_modules() -> None:
    assert set(registry.names("pruning")) >= {"divprune", "fastv", "flowcut", "random", "restore", "uniform"}
    assert set(registry.names("heads")) >= {"vhr"}
    for kind in registry.AREAS:
        for name in registry.names(kind):
            assert registry.method(kind, name)().name == name
            assert registry.summary(kind, name)
            assert registry.options(kind, name)


def test_specs_are_read_by_the_options_types() -> None:
    assert registry.build("pruning", "flowcut:keep=16,where=both,shared_count=true,tower_keep=none") == FlowCut(
        keep=16, where="both", shared_count=True
    )
    assert registry.build("pruning", "flowcut:keep=0.25") == FlowCut(keep=0.25)
    assert registry.build("heads", "vhr") == VHR()
    assert registry.build("heads", "vhr: alpha = 1.5 , layers=1+18-20") == VHR(alpha=1.5, layers=(1, 18, 19, 20))


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("pruning", "flowcutt", "did you mean 'flowcut'"),
        ("heads", "vhrr:alpha=2", "did you mean 'vhr'"),
        ("pruning", "flowcut:keeep=3", "did you mean 'keep'"),
        ("pruning", "flowcut:where=towr", "did you mean 'tower'"),
        ("heads", "vhr:text_stream=bth", "did you mean 'both'"),
    ],
)
def test_the_nearest_name_is_suggested(kind, spec, message) -> None:
    with pytest.raises(UnknownName, match=message):
        registry.build(kind, spec)


@pytest.mark.parametrize(
    "spec", ["flowcut:keep=many", "flowcut:keep", "flowcut:shared_count=maybe", "flowcut:layer=1.5", "flowcut:keep="]
)
def test_values_of_the_wrong_type_are_refused(spec) -> None:
    with pytest.raises(UsageError):
        registry.build("pruning", spec)


def test_unknown_kind() -> None:
    with pytest.raises(UnknownName, match="pruning"):
        registry.names("prunning")


CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-3:]))
def test_every_config_loads(path) -> None:
    kind = "pruning" if "token_pruning" in path.parts else "heads"
    assert registry.build(kind, str(path)).name == path.parent.name
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method: flowcut\noption: {}", "did you mean 'options'"),
        ("method: flowcut\noptions: {keeep: 3}", "did you mean 'keep'"),
        ("options: {}", "needs the keys"),
        ("method: flowcut\noptions: 5", "expected a mapping"),
        ("- 1", "needs the keys"),
        ("a: [", "cannot read"),
        ("!!python/object/apply:os.system ['true']", "cannot read"),
    ],
)
def test_faulty_configs_name_the_key(tmp_path, content, message) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        registry.build("pruning", str(tmp_path / "c.yaml"))


def test_missing_configs() -> None:
    with pytest.raises(UsageError, match="cannot read"):
        registry.build("pruning", "none.yaml")


def test_a_method_can_be_the_option_of_a_method() -> None:
    from vislm.token_pruning.divprune import DivPrune
    from vislm.token_pruning.restore import Restore

    assert registry.build("pruning", "restore:base=divprune,keep=16") == Restore(keep=16, base=DivPrune())
    with pytest.raises(UsageError, match="expected the name of a pruning method"):
        registry.build("pruning", "restore:base=divprun")


def test_lists_of_numbers() -> None:
    from vislm.token_pruning.pyramiddrop import PyramidDrop

    assert registry.build("pruning", "pyramiddrop:ratios=0.6+0.3+0.1") == PyramidDrop(ratios=(0.6, 0.3, 0.1))
    with pytest.raises(UsageError, match="numbers such as"):
        registry.build("pruning", "pyramiddrop:ratios=a+b")


def test_a_method_inside_a_method_in_yaml(tmp_path: Path) -> None:
    from vislm.token_pruning.divprune import DivPrune
    from vislm.token_pruning.staged import Staged

    path = tmp_path / "staged.yaml"
    path.write_text(
        "method: staged\noptions:\n  keep: 16\n  tower: flowcut\n  selection:\n    method: divprune\n"
        "    options: {newlines: false}\n"
    )
    expected = Staged(keep=16, tower=FlowCut(), selection=DivPrune(newlines=False))
    assert registry.build("pruning", str(path)) == expected
    path.write_text("method: staged\noptions: {towr: {method: flowcut}}\n")
    with pytest.raises(UnknownName, match="tower"):
        registry.build("pruning", str(path))


@pytest.mark.parametrize("name", registry.names("pruning"))
def test_every_pruning_method_has_the_shared_options(name: str) -> None:
    assert {"positions", "calibrate"} <= registry.options("pruning", name).keys()


def test_lists_are_described_by_what_they_hold() -> None:
    shown = {
        (name, option): text
        for name in registry.names("heads")
        for option, (text, _) in registry.options("heads", name).items()
    }
    assert shown["ad_hh", "heads"] == "a file | heads such as 16/29+26/9 | none"
    assert shown["zerotuning", "factors"] == "a file | factors of heads such as 3/0/1.5+4/7/0.8 | none"
    assert shown["var", "dims"] == "a file | dimensions such as 1415+2533 | none"
    assert shown["vhr", "layers"] == "layers such as 1+18-31 | none"
    assert registry.options("pruning", "sparsevlm")["counts"][0] == "whole numbers such as 8+4+2 | none"
    assert not [key for key, text in shown.items() if "layers" in text and not key[1].endswith("layers")]


@pytest.mark.parametrize("layers", ["5-3", "1+", "a", "-1"])
def test_layers_that_are_none_are_refused(layers) -> None:
    with pytest.raises(UsageError, match=f"vhr: layers='{re.escape(layers)}': expected layers such as 1"):
        registry.build("heads", f"vhr:layers={layers}")


def test_heads_in_a_file_may_be_pairs(tmp_path) -> None:
    path = tmp_path / "heads.yaml"
    path.write_text("method: ad_hh\noptions: {heads: [[16, 29], 26/9]}")
    assert registry.build("heads", str(path)) == registry.build("heads", "ad_hh:heads=16/29+26/9")
