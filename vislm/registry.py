"""Finding methods by name: a method is a module of its area's package, so adding one edits no table."""

from __future__ import annotations

import dataclasses
import pkgutil
import types
import typing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislm.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from vislm.lmm.interventions import Intervention

AREAS = {"pruning": "vislm.token_pruning", "heads": "vislm.heads"}
"""Kind of method -> package whose public modules are the methods."""


def names(kind: str) -> list[str]:
    """Return the names of all methods of a kind, without importing them.

    Raises:
        UnknownName: no such kind.
    """
    if kind not in AREAS:
        raise UnknownName("kind of method", kind, AREAS)
    package = import_module(AREAS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def method(kind: str, name: str) -> type[Intervention]:
    """Return the class of a method.

    Raises:
        UnknownName: no such method; the message names the nearest ones.
    """
    if name not in names(kind):
        raise UnknownName("pruning method" if kind == "pruning" else "head method", name, names(kind))
    return import_module(f"{AREAS[kind]}.{name}").METHOD


def summary(kind: str, name: str) -> str:
    """Return the first line of a method's module documentation."""
    return (import_module(f"{AREAS[kind]}.{name}").__doc__ or "").strip().splitlines()[0]


def options(kind: str, name: str) -> dict[str, tuple[str, Any]]:
    """Return option -> (type, default) of a method."""
    cls = method(kind, name)
    hints = typing.get_type_hints(cls)
    return {f.name: (_type_name(hints[f.name], f.name), f.default) for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]


def build(kind: str, spec: str) -> Intervention:
    """Build a method from ``name:option=value,...``, e.g. ``flowcut:keep=16`` or ``vhr:alpha=2,layers=1+18-31``.

    Values are read by the option's declared type: numbers, true/false, none, one of a list of words, or layer lists
    joined by ``+`` with ranges ``a-b``.

    A spec that ends in .yaml names a file with the keys ``method`` and ``options`` instead (see configs/).

    Raises:
        UnknownName: unknown method or option.
        UsageError: a value of the wrong type, a file that cannot be read.
    """
    if spec.endswith((".yaml", ".yml")):
        return _from_file(kind, Path(spec))
    name, _, rest = spec.partition(":")
    cls = method(kind, name.strip())
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    arguments: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        option, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"{spec!r}: {pair!r} is not of the form option=value")
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
        arguments[option] = parse_value(text, hints[option], f"{name}: {option}")
    return cls(**arguments)


def _from_file(kind: str, path: Path) -> Intervention:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("method"), str):
        raise UsageError(f"{path} needs the keys method (a name) and options (a mapping)")
    for key in content:
        if key not in ("method", "options"):
            raise UnknownName(f"key in {path}", str(key), ("method", "options"))
    chosen = content.get("options") or {}
    if not isinstance(chosen, dict):
        raise UsageError(f"{path}: options is {chosen!r}; expected a mapping")
    return _from_mapping(kind, content["method"], chosen)


def _from_mapping(kind: str, name: str, chosen: dict[str, Any]) -> Intervention:
    """Build a method from option -> value; a value {method: ..., options: ...} is a method of its own."""
    nested: dict[str, Any] = {}
    pairs = []
    for key, value in chosen.items():
        if isinstance(value, dict):
            nested[key] = _from_mapping("pruning", str(value.get("method")), value.get("options") or {})
        else:
            pairs.append(f"{key}={'+'.join(map(_entry, value)) if isinstance(value, list) else value}")
    built = build(kind, f"{name}:{','.join(pairs)}")
    known = {f.name for f in dataclasses.fields(built)}  # pyright: ignore[reportArgumentType]
    for key in nested:
        if key not in known:
            raise UnknownName(f"option of {name}", key, known)
    return dataclasses.replace(built, **nested)  # pyright: ignore[reportArgumentType]


def _entry(value: Any) -> str:
    """Return an entry of a list as text; [16, 29] is a head."""
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def parse_value(text: str, hint: Any, where: str) -> Any:
    """Return ``text`` as a value of the type ``hint``; the error names ``where`` and what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(arguments, key=_strictness):
            try:
                return parse_value(text, choice, where)
            except UsageError:
                continue
    elif hint is type(None):
        if text.lower() in ("none", "null"):
            return None
    elif origin is typing.Literal:
        if text in arguments:
            return text
        raise UnknownName(where, text, map(str, arguments))
    elif getattr(hint, "__name__", "") == "Intervention":
        return build("pruning", text)
    elif hint is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
    elif origin is tuple:
        try:
            if arguments[0] is float:
                return tuple(float(part) for part in text.split("+"))
            return tuple(n for part in text.split("+") for n in _range(part))
        except ValueError:
            pass
    elif hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    elif hint is str:
        return text
    raise UsageError(f"{where}={text!r}: expected {_type_name(hint, where)}")


def _strictness(hint: Any) -> int:
    return [type(None), bool, int, float].index(hint) if hint in (type(None), bool, int, float) else 9


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise ValueError(f"{part} ends before it begins")
    return numbers


def _type_name(hint: Any, option: str) -> str:
    """Return what an option takes; ``option`` ends in its name, which tells one list of whole numbers from another."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        listed = any(typing.get_origin(h) is tuple for h in choices)
        return " | ".join("a file" if h is str and listed else _type_name(h, option) for h in choices)
    if typing.get_origin(hint) is tuple:
        return _list_name(typing.get_args(hint)[0], option)
    if getattr(hint, "__name__", "") == "Intervention":
        return "the name of a pruning method"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _list_name(entry: Any, option: str) -> str:
    """Return what a list of such entries is, with an example."""
    width = len(typing.get_args(entry))
    if width:
        return "heads such as 16/29+26/9" if width == 2 else "factors of heads such as 3/0/1.5+4/7/0.8"
    if entry is float:
        return "numbers such as 0.5+0.25"
    if option.endswith("dims"):
        return "dimensions such as 1415+2533"
    return "layers such as 1+18-31" if option.endswith("layers") else "whole numbers such as 8+4+2"
