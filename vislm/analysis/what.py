"""Which parts of an analysis are wanted."""

from __future__ import annotations

from collections.abc import Sequence

from vislm.errors import UnknownName, UsageError


def chosen_parts(what: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the parts named by "all", "a,b" or a list, in the order of ``known``.

    Raises:
        UnknownName: no such part; names the nearest ones.
        UsageError: none at all.
    """
    names = [n.strip() for n in what.split(",")] if isinstance(what, str) else list(what)
    names = [name for name in names if name]
    if not names:
        raise UsageError(f"{what=} names nothing; expected all, or some of {', '.join(known)}")
    for name in names:
        if name != "all" and name not in known:
            raise UnknownName("part of the analysis", name, ("all", *known))
    return tuple(known) if "all" in names else tuple(name for name in known if name in names)
