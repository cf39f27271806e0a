"""Try everything that may go wrong with an evaluation, count what breaks, and write docs/reliability.md.

    python scripts/reliability.py                     # the sizes that the tests use, about half a minute
    python scripts/reliability.py --full              # ten times as many; kills of the real command; ten minutes
    python scripts/reliability.py --only throughput   # what the runner costs; on an otherwise idle machine
    python scripts/reliability.py --only kills paths  # some trials

With --out the tables of the page are replaced: the trials' if all of them ran, the throughput's if it was measured.
Exits with 1 if a promise was broken; the failing cases are printed with what repeats them.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vislm.files import atomic_write
from vislm.report.tables import markdown_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "reliability"))
PACKAGES = ("torch", "pillow", "transformers", "numpy")
THROUGHPUT = "throughput"


def main() -> None:
    from trials import FULL, QUICK, trials

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--only", nargs="*", help=f"names of trials, or {THROUGHPUT}")
    parser.add_argument("--out", type=Path, help="page whose tables are replaced, e.g. docs/reliability.md")
    options = parser.parse_args()
    every = trials(replace(FULL if options.full else QUICK, seed=options.seed))
    if unknown := set(options.only or ()) - {*every, THROUGHPUT}:
        parser.error(f"no trials {sorted(unknown)}; expected some of {[*every, THROUGHPUT]}")
    chosen = {name: run for name, run in every.items() if not options.only or name in options.only}
    tables: dict[str, str] = {}
    rows, broken = _run(chosen)
    full = " --full" if options.full else ""
    if chosen:
        tables["trials"] = _measured(f"{full} --seed {options.seed}", rows)
    if not options.only or THROUGHPUT in options.only:
        tables[THROUGHPUT] = _measured(f" --only {THROUGHPUT}", _throughput())
    for name, table in tables.items():
        print(table)
        if options.out and (name == THROUGHPUT or len(chosen) == len(every)):
            _replace(options.out, name, table)
    sys.exit(1 if broken else 0)


def _run(chosen: Mapping[str, Callable[[], Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return a row per trial, and how many promises were broken."""
    rows, broken = [], 0
    for run in chosen.values():
        outcome = run()
        broken += len(outcome.failures)
        rows.append(
            {
                "trial": outcome.trial,
                "cases": outcome.cases,
                "found": "; ".join(f"{name}: {value}" for name, value in outcome.found.items()),
                "broken promises": len(outcome.failures),
                "s": f"{outcome.seconds:.0f}",
            }
        )
        print(rows[-1], flush=True)
        for failure in outcome.failures[:20]:
            print(f"  {failure}", flush=True)
    return rows, broken


def _throughput() -> list[dict[str, Any]]:
    from throughput import overhead, scoring

    return [{"figure": name, "value": str(value)} for name, value in {**scoring(), **overhead()}.items()]


def _measured(arguments: str, rows: list[dict[str, Any]]) -> str:
    """Return a table below the command and the versions that it was measured with."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    place = f"Python {platform.python_version()}, {platform.system()}, {versions}"
    return f"`python scripts/reliability.py{arguments}` on {place}:\n\n{markdown_table(rows)}\n"


def _replace(page: Path, name: str, text: str) -> None:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    with atomic_write(page) as file:
        file.write(f"{before}{begin}{text}{end}{after}")


if __name__ == "__main__":
    main()
