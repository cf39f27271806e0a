"""Try everything that may go wrong with an evaluation, count what breaks, and write docs/reliability.md.

    python scripts/reliability.py            # the sizes that the tests use, about half a minute
    python scripts/reliability.py --full     # ten times as many; kills of the real command; about ten minutes

Exits with 1 if a promise was broken; the failing cases are printed with what repeats them.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from vislm.files import atomic_write
from vislm.report.tables import markdown_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "reliability"))
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def main() -> None:
    from throughput import overhead, scoring
    from trials import FULL, QUICK, trials

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--only", nargs="*", help="names of trials")
    parser.add_argument("--out", type=Path, help="page whose measured part is replaced, e.g. docs/reliability.md")
    options = parser.parse_args()
    size = replace(FULL if options.full else QUICK, seed=options.seed)
    chosen = {name: run for name, run in trials(size).items() if not options.only or name in options.only}
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
    text = markdown_table(rows)
    if not options.only:
        measured = {**scoring(), **overhead()}
        text += "\n\n" + markdown_table([{"figure": name, "value": str(value)} for name, value in measured.items()])
    names = ("torch", "pillow", "transformers", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    command = f"python scripts/reliability.py{' --full' if options.full else ''} --seed {options.seed}"
    text = f"`{command}` on Python {platform.python_version()}, {platform.system()}, {versions}:\n\n{text}\n"
    print(text)
    if options.out:
        _replace(options.out, text)
    sys.exit(1 if broken else 0)


def _replace(page: Path, text: str) -> None:
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    after = rest.split(END)[1]
    with atomic_write(page) as file:
        file.write(f"{before}{BEGIN}{text}{END}{after}")


if __name__ == "__main__":
    main()
