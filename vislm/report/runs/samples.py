"""The sample browser: which samples are shown, and what each card says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vislm.report.runs.bundle import Bundle
from vislm.report.runs.kept import kept_text, veil
from vislm.report.runs.pictures import PictureFinder, jpeg_uri, png_uri, thumbnail
from vislm.report.runs.tables import short

STATES = {"wrong": "wrong", "unparsed": "unparsed", "partly": "partly right", "uncounted": "not counted"}
STATES |= {"right": "right"}
"""State -> what the page calls it, in the order in which samples are shown."""
_SURE = 1e-9
_TEXT, _JSON, _OTHER = 1200, 400, 200
"""Characters that a card shows of a text, of a JSON value, and of what else a row holds."""
_SHOWN = {"id", "images", "group", "prompt", "text", "truth", "answer", "score", "values", "parts", "kept", "phases"}
_SENTENCE = 40
"""Characters from which on a list's texts stand on lines of their own."""
_PICTURES = 4
"""Pictures of a sample that are shown."""


@dataclass(frozen=True)
class View:
    """A picture with what a run left of it."""

    caption: str
    thumb: int | None
    """Number of the thumbnail; None: there is no picture."""
    veil: str | None
    """Data URI of what lies over it."""


@dataclass(frozen=True)
class Said:
    """What one run made of a sample."""

    run: str
    state: str
    text: str
    answer: str
    score: str
    facts: str
    """Tokens, time, numbers and whatever else the row holds."""


@dataclass(frozen=True)
class Card:
    """A sample."""

    id: str
    state: str
    """Of the first run."""
    flipped: bool
    """Whether the runs' scores differ."""
    question: str
    truth: str
    group: str
    parts: tuple[str, ...]
    views: tuple[View, ...]
    said: tuple[Said, ...]


@dataclass
class Album:
    """Thumbnails that cards share: data URI and size, each picture once."""

    pictures: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, picture: Image.Image) -> tuple[int, tuple[int, int]]:
        """Return number and size of a picture's thumbnail."""
        small = thumbnail(picture)
        uri = jpeg_uri(small)
        if uri not in self._places:
            self._places[uri] = len(self.pictures)
            self.pictures.append((uri, small.size))
        return self._places[uri], small.size


def state_of(row: Mapping[str, Any]) -> str:
    """Return whether an answer is right, partly right, wrong, could not be read, or does not count."""
    score = row.get("score")
    if score is None:  # a detector's boxes count together, not one by one; a text that was dropped could not be read
        return "unparsed" if row.get("answer") is None and row.get("text") else "uncounted"
    if row.get("answer") is None and score <= 0:
        return "unparsed"
    return "right" if score >= 1 - _SURE else "wrong" if score <= _SURE else "partly"


def chosen(bundle: Bundle, count: int) -> list[str]:
    """Return the ids to show: flipped samples, then wrong ones, right ones last, at least a quarter of each kind that
    there is, evenly spread over the data set."""
    rows = bundle.runs[0].rows
    flipped = [i for n in range(1, len(bundle.runs)) for i in bundle.flipped(n)]
    flipped = list(dict.fromkeys(i for i in rows if i in set(flipped)))
    order = list(STATES)
    rest = [[i for i in rows if state_of(rows[i]) == s and i not in set(flipped)] for s in order]
    wrong, right = [i for some in rest[:-1] for i in some], rest[-1]
    kinds = [kind for kind in (flipped, wrong, right) if kind]
    share = max(1, count // 4)
    room = max(0, count - sum(min(len(kind), share) for kind in kinds))
    found: list[str] = []
    for kind in kinds:
        more = min(room, max(0, len(kind) - share))
        found += _spread(kind, min(len(kind), share) + more)
        room -= more
    return found[:count]


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """Return ``count`` of the ids, evenly spread."""
    return [ids[n * len(ids) // count] for n in range(count)] if count < len(ids) else list(ids)


def cards(bundle: Bundle, count: int, finder: PictureFinder, album: Album) -> list[Card]:
    """Return what the browser shows; pictures go into the album."""
    flipped = {i for n in range(1, len(bundle.runs)) for i in bundle.flipped(n)}
    return [_card(bundle, i, i in flipped, finder, album) for i in chosen(bundle, count)]


def _card(bundle: Bundle, sample: str, flipped: bool, finder: PictureFinder, album: Album) -> Card:
    rows = [run.rows[sample] for run in bundle.runs]
    first = rows[0]
    return Card(
        sample,
        state_of(first),
        flipped,
        short(first.get("prompt", ""), _TEXT),
        readable(first.get("truth")),
        str(first.get("group", "")),
        tuple(map(str, first.get("parts", ()))),
        tuple(_views(bundle, rows, finder, album)),
        tuple(_said(label, row) for label, row in zip(bundle.labels, rows, strict=True)),
    )


def _views(bundle: Bundle, rows: Sequence[Mapping[str, Any]], finder: PictureFinder, album: Album) -> list[View]:
    names = rows[0].get("images")
    names = [str(name) for name in names] if isinstance(names, list) else []
    pictures = finder.find(rows[0])
    found: list[View] = []
    for place, name in enumerate(names[:_PICTURES]):
        picture = pictures[place] if place < len(pictures) else None
        if picture is None:
            found.append(View(short(name), None, None))
            continue
        thumb, size = album.add(picture)
        veils = [_veiled(row, place, size) for row in rows]
        drawn = [(label, v) for label, v in zip(bundle.labels, veils, strict=True) if v]
        if not drawn:
            found.append(View(short(name), thumb, None))
        for label, (uri, tokens) in drawn[:_PICTURES]:
            caption = f"{tokens}, {label}" if len(rows) > 1 else tokens
            found.append(View(caption, thumb, uri))
    return found


def _veiled(row: Mapping[str, Any], place: int, size: tuple[int, int]) -> tuple[str, str] | None:
    """Return what lies over a picture and how many tokens are left of it; None if nothing was dropped."""
    kept = row.get("kept")
    if not isinstance(kept, list) or place >= len(kept):
        return None
    drawn = veil(kept[place], size)
    return None if drawn is None else (png_uri(drawn), kept_text(kept[place]))


def _said(label: str, row: Mapping[str, Any]) -> Said:
    score = row.get("score")
    return Said(
        label,
        state_of(row),
        short(row.get("text", ""), _TEXT),
        readable(row.get("answer")),
        "" if score is None else f"{score:.3g}",
        _facts(row),
    )


def _facts(row: Mapping[str, Any]) -> str:
    found = []
    before, after = row.get("visual_tokens"), row.get("visual_tokens_kept")
    if isinstance(before, int) and isinstance(after, int) and before:
        found.append(f"{after} of {before} visual tokens")
    seconds = row.get("seconds")
    if isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds:
        found.append(f"{1e3 * seconds:.1f} ms")
    values = row.get("values") or {}
    found += [f"{name} {value:.4g}" for name, value in values.items() if name not in ("label", "answer")]
    known = {"visual_tokens", "visual_tokens_kept", "seconds", "flops", *_SHOWN}
    if "margin" in values:
        known.add("candidates")
    found += [
        f"{name}: {short(readable(value), _OTHER)}"
        for name, value in row.items()
        if name not in known and value not in ({}, [])
    ]
    return " · ".join(found)


def readable(value: Any) -> str:
    """Return a JSON value as people read it, cut to a moderate length; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return short(value, _TEXT)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return short(("\n" if max(map(len, value)) > _SENTENCE else ", ").join(value), _TEXT)
    return short(json.dumps(_rounded(value), ensure_ascii=False, default=str), _JSON)


def _rounded(value: Any, depth: int = 8) -> Any:
    """Shorten the numbers of a nested value, and cut off what is nested deeper than anyone reads."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, (list, dict)) and depth == 0:
        return "…"
    if isinstance(value, list):
        return [_rounded(v, depth - 1) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v, depth - 1) for k, v in value.items()}
    return value
