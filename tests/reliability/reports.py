"""Scripts in captions, answers, names and questions: a report shows them as text."""

from __future__ import annotations

from html.parser import HTMLParser

from outcome import Outcome, Stopwatch

from vislm.report.page import Facts, Section, Table, Text, render_page

PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)>",
    "<body onload=alert(1)>",
    "<a href='javascript:alert(1)'>a</a>",
    '<a href="data:text/html,<script>alert(1)</script>">a</a>',
    "<link rel=stylesheet href=//evil.example/a.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example/>",
    "<form action=//evil.example><input name=a></form>",
    "<object data=//evil.example></object>",
    "<embed src=//evil.example>",
    "<style>@import '//evil.example/a.css';</style>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</td></table><script>alert(1)</script>",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "{{ 7*7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;<script>alert(1)</script>",
    "<ScRiPt\n>alert(1)</sCrIpT\t>",
    "<details open ontoggle=alert(1)>",
    "\u2028<script>alert(1)</script>\0",
)


def trial() -> Outcome:
    """Render pages with every payload in every place that takes text."""
    watch, failures = Stopwatch(), []
    expected = _structure(_page("harmless"))
    for payload in PAYLOADS:
        page = _page(payload)
        if _structure(page) != expected:
            failures.append(f"{payload!r} changes the page")
        if "49" in page.replace(_page("harmless"), "") and "{{ 7*7 }}" in payload and "{{ 7*7 }}" not in page:
            failures.append(f"{payload!r} is evaluated")
    found = {"payloads that reach the page as anything but text": len(failures)}
    return Outcome("scripts in a report's texts", len(PAYLOADS), found, watch.seconds, failures)


def _page(text: str) -> str:
    table = Table([{text: text, "number": 1}], caption=text)
    section = Section(text, [Text(text), table, Facts({text: text})])
    return render_page(text, [section, Section(text)], lead=text, footer=text)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def _structure(page: str) -> list[tuple[str, tuple[str, ...]]]:
    parser = _Tags()
    parser.feed(page)
    return parser.found
