"""Nothing in a fixture goes uncompared without being named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vislm.golden.fixtures import Comparison, Fixture, Skipped


def compared(fixture: Fixture, comparisons: Iterable[Comparison]) -> Iterator[Comparison | Skipped]:
    """Yield the comparisons, then a :class:`Skipped` for each output that none of them names."""
    names = []
    for comparison in comparisons:
        names.append(comparison.name)
        yield comparison
    for output in fixture.outputs:
        if not any(name.startswith(output) for name in names):
            yield Skipped(output)
