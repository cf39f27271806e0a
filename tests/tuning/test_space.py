"""Which options are searched, between which values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from vislm.errors import UnknownName, UsageError
from vislm.token_pruning.fastv import FastV
from vislm.tuning.space import Choices, Interval, Method


@dataclass(frozen=True)
class Dummy:
    """A method with every kind of option."""

    keep: int | float = 0.5
    depth: int = field(default=2, metadata={"range": lambda budget, layers: (1, layers // 2)})
    rate: float = field(default=0.1, metadata={"range": (1e-4, 1.0), "log": True})
    where: Literal["a", "b"] = field(default="a", metadata={"choices": ("a", "b")})
    plain: float = 1.0
    name = "dummy"

    def plan(self, adapter):
        return []


def dummy(given: tuple[str, ...] = (), wanted: dict | None = None) -> Method:
    return Method(Dummy(), frozenset(given), wanted or {})


def test_declared_ranges_may_depend_on_budget_and_depth() -> None:
    space = dummy().space(0.25, 28)
    assert space == {
        "depth": Interval(1, 14),
        "rate": Interval(1e-4, 1.0, log=True),
        "where": Choices(("a", "b")),
    }
    bounds = Method.of("vflowopt").space(0.25, 28)
    assert bounds["R1"] == Interval(0.25, 0.375)
    assert bounds["R2"] == Interval(0.8 / 1.5, 1.0)
    assert (bounds["t"], bounds["a"], bounds["alpha"]) == (
        Interval(0.0, 50.0),
        Interval(3.0, 24.0),
        Interval(-1.0, 1.0),
    )
    assert Method.of("vflowopt").space(0.9, 28)["R1"] == Interval(0.9, 1.0)


def test_every_methods_ranges_hold_its_default() -> None:
    from vislm import registry

    searched = 0
    for name in registry.names("pruning"):
        method = Method.of(name)
        try:
            space = method.space(0.5, 32)
        except UsageError:
            continue  # declares none
        for option, values in space.items():
            default = method.defaults[option]
            searched += 1
            if isinstance(values, Choices):
                assert default in values.values
            elif default is not None:
                assert values.low <= default <= values.high, f"{name}: {option}"
    assert searched >= 8


def test_what_the_user_fixes_is_not_searched(tmp_path) -> None:
    assert set(dummy(given=("rate", "where")).space(0.5, 4)) == {"depth"}
    assert set(Method.of("flowcut:period=3").space(0.5, 4)) == {"history"}
    file = tmp_path / "start.yaml"
    file.write_text("method: flowcut\noptions:\n  keep: 16\n  history: 0.25\n")
    method = Method.of(str(file))
    assert method.given == {"keep", "history"}
    assert not method.solves_keep
    assert set(method.space(0.5, 4)) == {"period"}


def test_keep_is_solved_unless_it_is_given_or_searched() -> None:
    assert Method.of("fastv").solves_keep
    assert not Method.of("fastv:keep=0.5").solves_keep
    assert not Method.of("fastv", ["keep=0.1..0.9"]).solves_keep


def test_ranges_of_the_user() -> None:
    method = Method.of("vflowopt", ["t=0..5", "alpha=0.0..0.5", "recycle=true|false", "keep=16..64"])
    space = method.space(0.25, 28)
    assert space["t"] == Interval(0.0, 5.0)  # the option is a real number
    assert space["keep"] == Interval(16, 64)
    assert space["recycle"] == Choices((True, False))
    assert method.build({"t": 3.0}).t == 3.0


@pytest.mark.parametrize("text", ["t", "t=3", "t=5..1", "t=a..b", "recycle=true..false", "layers=1+2..3"])
def test_ranges_that_are_none(text) -> None:
    with pytest.raises(UsageError):
        Method.of("vflowopt", [text])


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'alpha'"):
        Method.of("vflowopt", ["alhpa=0..1"])
    with pytest.raises(UsageError, match="fixed by"):
        Method.of("vflowopt:t=3", ["t=0..5"])
    with pytest.raises(UsageError, match="declares no ranges"):
        Method.of("random").space(0.5, 4)


def test_optunas_form() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    forms = {name: values.distribution() for name, values in dummy().space(0.5, 8).items()}
    assert forms == {
        "depth": IntDistribution(1, 4),
        "rate": FloatDistribution(1e-4, 1.0, log=True),
        "where": CategoricalDistribution(("a", "b")),
    }
    assert Method.of("fastv").build({"layer": 3, "keep": 0.2}) == FastV(layer=3, keep=0.2)
