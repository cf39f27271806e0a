"""The page: tables, plots and the sample browser, in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vislm.report.page import Table
from vislm.report.runs.charts import Chart
from vislm.report.runs.samples import STATES, Album, Card
from vislm.report.runs.tables import NamedTable

TEMPLATES = Path(__file__).parent.parent / "templates"


@dataclass(frozen=True)
class BundlePart:
    """What the page shows of one benchmark."""

    title: str
    lead: str
    tables: Sequence[NamedTable]
    charts: Sequence[Chart]
    cards: Sequence[Card]
    total: int
    """Samples of the runs, shown or not."""
    notes: Sequence[str] = ()

    @property
    def states(self) -> dict[str, tuple[str, int]]:
        """State -> its name and how many cards have it."""
        counts = {state: sum(card.state == state for card in self.cards) for state in STATES}
        return {state: (STATES[state], n) for state, n in counts.items() if n}

    @property
    def flips(self) -> int:
        """Cards of samples whose score differs between the runs."""
        return sum(card.flipped for card in self.cards)

    @property
    def veiled(self) -> bool:
        """Whether a picture shows which tokens were dropped."""
        return any(view.veil for card in self.cards for view in card.views)

    @property
    def parts(self) -> list[str]:
        """Splits or sub-tasks of the cards."""
        return list(dict.fromkeys(part for card in self.cards for part in card.parts))

    @property
    def groups(self) -> list[str]:
        """Groups (pictures) that several cards share."""
        every = [card.group for card in self.cards]
        return [group for group in dict.fromkeys(every) if every.count(group) > 1]


def render(title: str, parts: Sequence[BundlePart], album: Album, *, footer: str = "") -> str:
    """Return the page as HTML.

    Every text is escaped. The policy in the page's head allows the one script and the one style sheet that it holds, by
    their hashes, and pictures inside the page; nothing else loads or runs. Without scripts all tables, plots and cards
    are there, only filters and keys are not.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "runs.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "runs.css").read_text(encoding="utf-8") + _thumbnails(album)
    return environment.get_template("runs.html.j2").render(
        title=title,
        parts=parts,
        state_names=STATES,
        table=lambda named: Table(named.rows, named.note),
        footer=footer,
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _thumbnails(album: Album) -> str:
    """Return a rule per picture; made of numbers and base64 only."""
    rules = [
        f'.t{number}{{background-image:url("{uri}");aspect-ratio:{size[0]}/{size[1]}'
        + (";image-rendering:pixelated" if max(size) <= _SMALL else "")
        + "}"
        for number, (uri, size) in enumerate(album.pictures)
    ]
    return "\n".join(["", *rules, ""])


_SMALL = 64


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
