"""Typed reading of mappings: a configuration's fields and a component's options, with errors that name the key."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vislm.errors import UnknownName, UsageError

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read(cls: type[T], content: object, where: str) -> T:
    """Return a dataclass from a mapping as YAML gives it; nested dataclasses and tuples of them included.

    Args:
        cls: a dataclass of numbers, texts, flags, components, dataclasses, and tuples of these.
        content: the mapping.
        where: what the errors call it, such as a file's path.

    Raises:
        UnknownName: an unknown key; names the nearest ones.
        UsageError: a missing key, or a value of the wrong type.
    """
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} is {content!r}, expected a mapping")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in fields:
            raise UnknownName(f"key of {where}", str(key), fields)
    unset = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in content and f.default is unset and f.default_factory is unset]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _value(hints[key], entry, f"{where}: {key}") for key, entry in content.items()})


def _value(hint: Any, given: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if given is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _value(hint, given, where)
    if origin is typing.Literal:
        if given not in arguments:
            raise UnknownName(where, str(given), arguments)
        return given
    if origin is tuple:
        if not isinstance(given, (list, tuple)) or not given:
            raise UsageError(f"{where} is {given!r}, expected a list")
        return tuple(_value(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(given))
    if dataclasses.is_dataclass(hint):
        return given if isinstance(given, typing.cast(type, hint)) else read(typing.cast(type, hint), given, where)
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if hint in _NAMES:
        if not isinstance(given, hint) or (hint is int and isinstance(given, bool)):
            raise UsageError(f"{where} is {given!r}, expected {_NAMES[hint]}")
        return given
    if isinstance(given, str):  # a component by its name alone
        return {"name": given}
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} is {given!r}, expected options, such as {{name: ...}}")
    return dict(given)


def make(kind: str, find: Callable[[Any], Callable[..., T]], spec: Mapping[str, Any], **sizes: Any) -> T:
    """Return the component that a specification ``{name: ..., option: value}`` describes.

    Args:
        kind: what the errors call it.
        find: name -> class.
        spec: the specification.
        sizes: arguments that the backbone itself gives.

    Raises:
        UnknownName: an unknown name or option; names the nearest ones.
        UsageError: a specification without a name.
    """
    options = dict(spec)
    if not isinstance(options.get("name"), (str, type)):
        raise UsageError(f"{kind} is {options}, expected {{name: ..., option: value}}")
    name = options.pop("name")
    cls = find(name)
    known = [option for option in inspect.signature(cls).parameters if option not in sizes]
    for option in options:
        if option not in known:
            raise UnknownName(f"option of the {kind} {name}", str(option), known)
    return cls(**sizes, **options)


def found_in(kind: str, table: Mapping[str, type[T]]) -> Callable[[str], type[T]]:
    """Return a function that looks a class up by name, and raises ``UnknownName`` for any other name."""

    def find(name: str) -> type[T]:
        if name not in table:
            raise UnknownName(kind, name, table)
        return table[name]

    return find
