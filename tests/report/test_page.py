"""The HTML page: self-contained, nothing in it can run."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from PIL import Image

from vislm.report.page import Facts, Figure, Section, Table, Text, write_page

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script src=//evil.example/x.js></script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<a href='javascript:alert(1)'>x</a>",
    "<base href=//evil.example>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<form action=https://evil.example><input name=q>",
    "<object data=x></object>",
    "<!-- --><b>bold</b><!--",
    "]]><x>",
    "{{ 7 * 7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{# gone #}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u202egnp.exe <b>",
    "a\x00b<script>",
]


class Outline(HTMLParser):
    """Collects elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(folder, word: str) -> Outline:
    picture = folder / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    blocks = [Text(word), Table([{word: word}], word, emphasis=[True]), Figure(picture, word), Facts({word: word})]
    page = write_page(folder / "page.html", word, [Section(word, [*blocks]), Section(word)], lead=word, footer=word)
    parser = Outline()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_becomes_markup(payload, tmp_path) -> None:
    plain, attacked = outline(tmp_path, "word"), outline(tmp_path, payload)
    assert attacked.tags == plain.tags
    assert [name for name, _ in attacked.attributes] == [name for name, _ in plain.attributes]
    shown = "".join(attacked.text)
    assert shown.count(payload) == "".join(plain.text).count("word")


def test_nothing_comes_from_elsewhere(tmp_path) -> None:
    parser = outline(tmp_path, "word")
    assert "script" not in parser.tags
    links = [value for name, value in parser.attributes if name in ("src", "href", "srcset", "action")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#section-")) for link in links)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in parser.attributes
    assert "url(" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_file_names_do_not_show(tmp_path) -> None:
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    assert "script" not in outline(folder, "word").tags
