"""Methods by name, options by type."""

from __future__ import annotations

import pytest

from vislm import VHR, FlowCut, registry
from vislm.errors import UnknownName, UsageError


def test_methods_are_found_by_their_modules() -> None:
    assert registry.names("pruning") == ["fastv", "flowcut", "random"]
    assert registry.names("heads") == ["vhr"]
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
