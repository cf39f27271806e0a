"""The search space of a method: which of its options are tried, and between which values.

A method declares it where it declares the option, in the field's metadata::

    history: float = field(default=0.5, metadata={"range": (0.0, 0.9)})
    layer: int = field(default=2, metadata={"range": lambda budget, layers: (1, layers // 2)})
    where: Literal["tower", "both"] = field(default="tower", metadata={"choices": ("tower", "both")})

Two whole numbers make a range of whole numbers. ``"log": True`` searches a range logarithmically. A range may depend on
the budget (the share of the cost that is allowed) and on the number of decoder layers. What declares nothing is not
searched, unless the user gives a range; what the user fixes is not searched either.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislm import registry
from vislm.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from vislm.lmm.interventions import Intervention

Value = int | float | str | bool


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``, both included; whole ones if both are."""

    low: int | float
    high: int | float
    log: bool = False

    def distribution(self) -> BaseDistribution:
        """Return optuna's form of it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """A few values without order."""

    values: tuple[Value, ...]

    def distribution(self) -> BaseDistribution:
        """Return optuna's form of it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))


Space = dict[str, Interval | Choices]
"""Option -> its values."""


@dataclass(frozen=True)
class Method:
    """A pruning method whose options are to be searched."""

    base: Intervention
    given: frozenset[str]
    """Options that the user has fixed."""
    wanted: Mapping[str, Interval | Choices]
    """Ranges that the user has given."""

    @classmethod
    def of(cls, spec: str, wanted: Sequence[str] = ()) -> Method:
        """Read a method as ``--prune`` gives it, and ranges such as ``t=0..10`` or ``where=tower|both``.

        Raises:
            UnknownName: no such method or option.
            UsageError: a range that is none, or one of an option that is fixed.
        """
        base = registry.build("pruning", spec)
        ranges = dict(_parse_range(base, text) for text in wanted)
        given = _given(spec)
        both = sorted(given & ranges.keys())
        if both:
            raise UsageError(f"{both[0]} is fixed by {spec!r} and searched by --search; give one of the two")
        return cls(base, given, ranges)

    @property
    def solves_keep(self) -> bool:
        """Whether ``keep`` is computed from the budget instead of being given or searched."""
        return "keep" in self.defaults and "keep" not in self.given and "keep" not in self.wanted

    @property
    def defaults(self) -> dict[str, Any]:
        """Option -> value of the method as the user gave it."""
        return {f.name: getattr(self.base, f.name) for f in _fields(self.base)}

    def space(self, budget: float, layers: int) -> Space:
        """Return what is searched for a budget (a share of the cost) on a model of so many decoder layers.

        Raises:
            UsageError: nothing is.
        """
        space: Space = dict(self.wanted)
        for option in _fields(self.base):
            if option.name in self.given or option.name in self.wanted:
                continue
            if "choices" in option.metadata:
                space[option.name] = Choices(tuple(option.metadata["choices"]))
            elif "range" in option.metadata:
                low, high = _bounds(option.metadata["range"], budget, layers)
                space[option.name] = Interval(low, max(low, high), bool(option.metadata.get("log", False)))
        if not space:
            raise UsageError(
                f"{self.base.name} declares no ranges for the options that are left to search; give some, such as "
                f"--search {next(iter(self.defaults), 'keep')}=0.1..0.9"
            )
        return {name: space[name] for name in sorted(space)}

    def build(self, options: Mapping[str, Any]) -> Intervention:
        """Return the method with these options."""
        return dataclasses.replace(self.base, **options)  # pyright: ignore[reportArgumentType]


def _fields(method: Intervention) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(method)  # pyright: ignore[reportArgumentType]


def _bounds(declared: Any, budget: float, layers: int) -> tuple[Any, Any]:
    return declared(budget, layers) if callable(declared) else declared  # pyright: ignore[reportReturnType]


def _given(spec: str) -> frozenset[str]:
    """Return the names of the options in a spec, which ``registry.build`` has accepted."""
    if spec.endswith((".yaml", ".yml")):
        import yaml

        content = yaml.safe_load(Path(spec).read_text(encoding="utf-8"))
        return frozenset(content.get("options") or {})
    return frozenset(pair.partition("=")[0].strip() for pair in spec.partition(":")[2].split(",") if pair)


def _parse_range(method: Intervention, text: str) -> tuple[str, Interval | Choices]:
    name, equals, values = (part.strip() for part in text.partition("="))
    hints = typing.get_type_hints(type(method))
    known = [f.name for f in _fields(method)]
    if name not in known:
        raise UnknownName(f"option of {method.name}", name, known)
    low, dots, high = values.partition("..")
    where = f"{method.name}: {name}"
    if dots:
        bounds = [registry.parse_value(part, hints[name], where) for part in (low, high)]
        if all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in bounds) and bounds[0] <= bounds[1]:
            whole = all(isinstance(b, int) for b in bounds)
            return name, Interval(bounds[0], bounds[1]) if whole else Interval(float(bounds[0]), float(bounds[1]))
    elif equals and "|" in values:
        return name, Choices(tuple(registry.parse_value(part, hints[name], where) for part in values.split("|")))
    raise UsageError(f"--search {text!r}: expected OPTION=LOW..HIGH, such as t=0..10, or OPTION=A|B")
