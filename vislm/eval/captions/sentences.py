"""Sentence boundaries of lower-cased English text, as the Punkt model for English draws them.

CHAIR's reference scorer lower-cases a caption before NLTK splits it into sentences. Without capitals, Punkt's
evidence shrinks to a few rules, which are all that is implemented here; the abbreviations are those of its English
model (T. Kiss and J. Strunk, "Unsupervised Multilingual Sentence Boundary Detection", 2006).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

_ABBREVIATIONS = (
    "a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co "
    "col colo conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga gen "
    "h h.c h.f h.m i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c m.j maj "
    "messrs mg mich minn mr mrs ms n n.c n.d n.h n.j n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa ph.d prof r "
    "r.a r.h r.i r.j r.k r.t rep reps s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn tues u.k u.n "
    "u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va w.w wash wed wis yr"
)
ABBREVIATIONS: Final = frozenset(_ABBREVIATIONS.split())
"""Words after which a full stop ends no sentence (the stop left off)."""

# After a number or a single letter, only these lower-case words begin a sentence: the model saw them there and never
# capitalised.
_STARTERS: Final = frozenset({"administrators", "b-week", "r-revised", "z-holiday"})

_CLOSERS: Final = r"""[)";}\]*:@'({\[?!\xab\xbb\u2018\u2019\u201c\u201d]"""
# A stop that may end a sentence: glued to one of the characters above, or with another word after it.
_STOP: Final = re.compile(rf"[.?!](?=(?P<after>{_CLOSERS}|\s+(?P<word>\S+)))")
_RUN: Final = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_PIECE: Final = re.compile(
    rf"{_RUN}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_CLOSERS}|{_RUN}|,(?=$|\s|{_CLOSERS}|{_RUN}))|\S"
)
_INITIAL_OR_NUMBER: Final = re.compile(r"[^\W\d]\.|-?[.,]?\d[\d,.-]*\.?")
# Quotes (guillemets and curly ones included) and brackets that a boundary must not tear from the sentence before it.
_TRAILING: Final = re.compile(r"""["')\]}\xab\xbb\u2018\u2019\u201c\u201d]+?(?:\s+|(?=--)|$)""", re.MULTILINE)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of lower-cased ``text``, without the white space between them."""
    starts, ends = [0], []
    for stop, context in _possible_ends(text):
        if _ends_sentence(context):
            ends.append(stop.end())
            starts.append(stop.start("word") if stop["word"] else stop.end())
    ends.append(len(text.rstrip()))
    sentences, taken = [], 0
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        start += taken
        taken = 0
        if index + 1 < len(starts) and (trailing := _TRAILING.match(text[starts[index + 1] : ends[index + 1]])):
            end = starts[index + 1] + len(trailing[0].rstrip())
            taken = trailing.end()
        if start < end:
            sentences.append(text[start:end])
    return sentences


def _possible_ends(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield the last stop of every word that has one, with its context: the word and what follows the stop."""
    previous: tuple[re.Match[str], str] | None = None
    word_start, searched = 0, 0
    for stop in _STOP.finditer(text):
        gap = max(text.rfind(space, searched, stop.start()) for space in string.whitespace)
        if gap > 0:
            word_start = gap + 1
        if previous and searched <= word_start:
            yield previous
        searched = stop.start()
        previous = stop, text[word_start : stop.end()] + stop["after"]
    if previous:
        yield previous


def _ends_sentence(context: str) -> bool:
    pieces = _PIECE.findall(context)
    return any(_is_end(piece, following) for piece, following in pairwise(pieces))


def _is_end(piece: str, following: str) -> bool:
    if piece in {".", "?", "!"}:
        return True
    if not piece.endswith(".") or piece.endswith(".."):
        return False
    word = piece[:-1]
    if word in ABBREVIATIONS or word.split("-")[-1] in ABBREVIATIONS:
        return False
    if _INITIAL_OR_NUMBER.fullmatch(piece):
        unlikely = following[0].islower() and following.rstrip(".") not in _STARTERS
        return not (unlikely or following in {";", ":", ",", ".", "!", "?"})
    return True
