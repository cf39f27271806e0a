"""One self-contained HTML page: pictures inside, no script, nothing from the network, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vislm.errors import ImageError
from vislm.files import atomic_write
from vislm.report.tables import Rows, format_cell, is_numeric, table_columns

_PNG = b"\x89PNG\r\n\x1a\n"
_SHORT = 32
"""Characters of a table cell that stay on one line."""


@dataclass(frozen=True)
class Text:
    """A paragraph; line breaks are kept."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table of rows (column -> value); rows whose ``emphasis`` is true are set in bold."""

    rows: Rows
    caption: str = ""
    columns: Sequence[str] | None = None
    emphasis: Sequence[bool] = ()
    kind: str = "table"

    @property
    def header(self) -> list[tuple[str, bool]]:
        """Column names and whether the column is numeric."""
        return [(name, is_numeric(self.rows, name)) for name in table_columns(self.rows, self.columns)]

    @property
    def body(self) -> list[tuple[bool, list[tuple[str, str]]]]:
        """Per row: emphasis, and its cells as (text, style)."""
        bold = [*self.emphasis, *[False] * len(self.rows)]
        return [
            (bold[number], [_styled(format_cell(row.get(name)), numeric) for name, numeric in self.header])
            for number, row in enumerate(self.rows)
        ]


def _styled(text: str, numeric: bool) -> tuple[str, str]:
    """Pair a cell's text with its style; only long texts may break into lines."""
    return text, "number" if numeric else "short" if len(text) <= _SHORT else "long"


@dataclass(frozen=True)
class Figure:
    """A PNG file, read when the page is built."""

    path: Path
    caption: str = ""
    kind: str = "figure"

    @property
    def data_uri(self) -> str:
        """The file as a data URI.

        Raises:
            ImageError: not a PNG file.
        """
        content = Path(self.path).read_bytes()
        if not content.startswith(_PNG):
            raise ImageError(self.path, "not a PNG file")
        return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True)
class Facts:
    """A few short figures side by side: name -> value."""

    facts: Mapping[str, str]
    kind: str = "facts"


Block = Text | Table | Figure | Facts


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def render_page(title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> str:
    """Return the page as HTML. Every text, from whatever model, file or user, is escaped.

    Args:
        title: the page's headline.
        sections: in order; a table of contents links to them when there are several.
        lead: a sentence under the headline.
        footer: small print, e.g. versions and machine.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, lead=lead, sections=sections, footer=footer)


def write_page(out: Path, title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> Path:
    """Write the page of :func:`render_page` to the HTML file ``out``, atomically, and return its path."""
    content = render_page(title, sections, lead=lead, footer=footer)
    with atomic_write(out) as handle:
        handle.write(content)
    return Path(out)
