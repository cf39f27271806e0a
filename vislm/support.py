"""Which method runs on which model family, and why not where it cannot: asked of the methods themselves.

Every method plans for a model of every family, built on torch's meta device from transformers' default configuration:
depths and grids are those of real checkpoints, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vislm import registry
from vislm.errors import PlanConflict, UsageError
from vislm.files import atomic_write
from vislm.lmm.adapters import FAMILIES, Adapter, adapter_for
from vislm.lmm.plan import compile_plan

OPTIONS = {
    "act": "heads=2/3",
    "ad_hh": "heads=2/3",
    "air": "heads=2/3",
    "cdpruner": "relevance=embedding",
    "fastv": "layer=3",
    "flowcut": "layer=2",
    "staged": "selection=divprune",
    "tome": "r=8",
    "var": "dims=5",
    "zerotuning": "factors=3/0/1.5",
}
"""What to give a method where its defaults do not do, for want of something found for the model or an early layer."""

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
"""Around the table in docs/families.md."""


@dataclass(frozen=True)
class Support:
    """Whether a method runs on a family."""

    works: bool
    options: str = ""
    """Options that it needs, such as ``layer=3``; empty where its defaults do."""
    reason: str = ""
    """Why it does not run."""


@cache
def reference_adapter(family: str) -> Adapter:
    """Return the adapter of a family's default configuration on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return adapter_for(AutoModelForImageTextToText.from_config(AutoConfig.for_model(family)))


def supported(kind: str, name: str, adapter: Adapter) -> Support:
    """Ask a method whether it runs on a model, with its defaults or else with ``OPTIONS``.

    Args:
        kind: "pruning" or "heads".
        name: of the method.
        adapter: of the model.
    """
    reason = ""
    for options in dict.fromkeys(("", OPTIONS.get(name, ""))):
        try:
            compile_plan([registry.build(kind, f"{name}:{options}")], adapter)
        except PlanConflict as conflict:
            reason = str(conflict)
        except UsageError as error:
            reason = reason or str(error)
        else:
            return Support(True, options)
    return Support(False, reason=reason)


def support_table() -> dict[tuple[str, str], dict[str, Support]]:
    """Return (kind, method) -> family -> whether it runs."""
    return {
        (kind, name): {family: supported(kind, name, reference_adapter(family)) for family in FAMILIES}
        for kind in registry.AREAS
        for name in registry.names(kind)
    }


def support_lines() -> Iterator[str]:
    """Yield the table as plain text, for ``vislm list methods --families``."""
    rows, reasons = _cells(support_table())
    width = max(len(name) for name in rows)
    yield f"{'':<{width}} {' '.join(FAMILIES)}"
    for name, cells in rows.items():
        row = " ".join(f"{c:<{len(family)}}" for c, family in zip(cells, FAMILIES, strict=True))
        yield f"{name:<{width}} {row}".rstrip()
    yield "yes*: needs options, see below"
    yield from _notes(reasons)


def support_markdown() -> str:
    """Return the table as Markdown, with the reasons below it."""
    rows, reasons = _cells(support_table())
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"|---{'|---' * len(FAMILIES)}|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([*lines, "", "`yes*`: with options, see below.", "", *_notes(reasons)])


def update_page(path: Path) -> None:
    """Write the table into a page, between its two markers."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    with atomic_write(path) as handle:
        handle.write(f"{before}{BEGIN}\n{support_markdown()}\n{END}{after}")


def _cells(table: dict[tuple[str, str], dict[str, Support]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return method -> cells, and method -> what has to be said about it."""
    rows: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for (_, name), families in table.items():
        rows[name] = [("yes*" if own.options else "yes") if own.works else "no" for own in families.values()]
        said: dict[str, list[str]] = {}
        for family, own in families.items():
            if own.options or not own.works:
                said.setdefault(f"with {own.options}" if own.works else own.reason, []).append(family)
        for text, where in said.items():
            everywhere = len(where) == len(families)
            notes.setdefault(name, []).append(text if everywhere else f"{', '.join(where)}: {text}")
    return rows, notes


def _notes(reasons: dict[str, list[str]]) -> Iterator[str]:
    for name, texts in reasons.items():
        yield from (f"- {name}: {text}" for text in texts)
