"""What stands in lmms-eval's ``--model_args``: the model and every method with all its options.

lmms-eval tells cached answers of one model from those of another by its name and its model_args alone. So a method can
be given nowhere else, and not as a file whose content may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vislm.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from vislm.lmm.interventions import Intervention

_HARNESS = ("max_batch_size",)
"""Arguments that lmms-eval adds and that mean nothing here."""


@dataclass(frozen=True)
class ModelArgs:
    """Read and checked model_args."""

    pretrained: str = "vislm-tiny"
    prune: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "cpu"
    batch_size: int = 1

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ModelArgs:
        """Return what was given; values are texts, numbers or booleans, as lmms-eval reads them.

        Several methods are joined by ``;``; an option's comma needs quotes: ``prune="flowcut:keep=64,layer=1"``.

        Raises:
            UnknownName: an argument that there is not.
            UsageError: a value that cannot be read, or a method from a file.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names and name not in _HARNESS:
                raise UnknownName("model argument", name, names)
        values = {name: given[name] for name in names if given.get(name) not in (None, "")}
        for name in ("prune", "heads"):
            if name in values:
                values[name] = _methods(name, values[name])
        if "batch_size" in values:
            values["batch_size"] = _batch_size(values["batch_size"])
        for name in ("pretrained", "dtype", "device"):
            if name in values:
                values[name] = str(values[name]).strip("\"'")
        return cls(**values)

    def interventions(self) -> list[Intervention]:
        """Build the methods.

        Raises:
            UnknownName: unknown method or option.
            UsageError: a value of the wrong type.
        """
        from vislm import registry

        return [registry.build("pruning", s) for s in self.prune] + [registry.build("heads", s) for s in self.heads]


def _methods(name: str, value: Any) -> tuple[str, ...]:
    specs = tuple(spec for part in str(value).split(";") if (spec := part.strip().strip("\"'")))
    for spec in specs:
        if spec.endswith((".yaml", ".yml")):
            raise UsageError(
                f"{name}={spec}: lmms-eval's cache would not notice that the file changed; write the method out, "
                f'e.g. {name}="NAME:OPTION=VALUE,..."'
            )
    return specs


def _batch_size(value: Any) -> int:
    try:
        size = int(str(value).partition(":")[0])
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"batch_size={value}: expected a whole number >= 1 (there is no automatic choice)")
    return size
