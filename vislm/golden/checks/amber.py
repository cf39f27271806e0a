"""AMBER's fixtures: what the official script prints for yes/no answers."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.eval.questions.amber_scores import discriminative
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact

SECTIONS = {
    "Descriminative Task": "all",
    "Exsitence": "existence",
    "Attribute": "attribute",
    "State": "state",
    "Number": "number",
    "Action": "action",
    "Relation": "relation",
}
"""Heading, in the script's spelling -> our name."""


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare every printed figure; a table that is printed must be complete."""
    data = fixture.data
    if "items" not in data or "official_stdout" not in data:
        raise Unhandled(f"keys {sorted(data)} belong to no known AMBER fixture")
    ours = discriminative([(item["type"], item["truth"], item["response"]) for item in data["items"]])
    section, compared = "", set()
    for line in data["official_stdout"]:
        name, colon, value = line.partition(":")
        if colon and not value.strip():
            section = SECTIONS.get(name, "")
            if not section:
                raise Unhandled(f"{name!r} is no known table of AMBER's yes/no part")
        elif colon and section in ours:
            key = name.strip().lower()
            compared.add((section, key))
            yield exact(f"{section}.{key}", ours[section][key], float(value))
        elif colon and float(value):
            yield exact(f"{section}.{name}", "left out", value.strip())  # no question, yet the script prints a number
    tables = {table for table, _ in compared}
    yield exact("figures", sorted(compared), sorted((table, key) for table in tables for key in ours[table]))
