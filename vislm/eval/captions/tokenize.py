"""Words and punctuation of lower-cased English text, as NLTK's ``word_tokenize`` gives them, in plain Python.

The conventions are those of the Penn Treebank ("it's" -> "it", "'s"; "cannot" -> "can", "not"; straight double quotes
become `` and ''), applied to one sentence at a time: a full stop is split off only at the end of a sentence.
"""

from __future__ import annotations

import re
from typing import Final

from vislm.eval.captions.sentences import split_sentences


def _compile(*edits: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in edits)


# Edits in order; each sees the result of those before it. A space marks a token boundary.
_BEFORE_PADDING: Final = _compile(
    (r"([\xab\u201c\u2018\u201e]|`+)", r" \1 "),
    (r'^"', "``"),
    ("``", " `` "),
    (r"""([ (\[{<])("|'')""", r"\1 `` "),
    # an apostrophe before a word is a quote, unless the two are a clitic
    (r"(?<!\w)'(?=\w)(?!(?:[mtsdn]|re|ve|ll)\b)", "' "),
    (r"""([^.])\.([\]\)}>"'\xbb\u201d\u2019 ]*)\s*$""", r"\1 . \2 "),
    (r"([:,])(\D|$)", r" \1 \2"),
    (r"(\.{2,}|[;@#$%&?!*\u2012\u2013\u2014\u2015])", r" \1 "),
    ("([^'])' ", r"\1 ' "),
    (r"([\]\[(){}<>]|--)", r" \1 "),
)
_AFTER_PADDING: Final = _compile(
    (r"([\xbb\u201d\u2019])", r" \1 "),
    (r"''|\"", " '' "),
    (r"([^'\s])('[smd]?)(?=\s)", r"\1 \2 "),
    (r"([^'\s])('ll|'re|'ve|n't)(?=\s)", r"\1 \2 "),
    (r"\b(can)(not)\b", r" \1 \2 "),
    (r"\b(d)('ye)\b", r" \1 \2 "),
    (r"\b(gim|lem)(me)\b", r" \1 \2 "),
    (r"\b(gon)(na)\b", r" \1 \2 "),
    (r"\b(got)(ta)\b", r" \1 \2 "),
    (r"\b(more)('n)\b", r" \1 \2 "),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "),
    (r" ('t)(is|was)\b", r" \1 \2 "),
)


def tokenize(text: str) -> list[str]:
    """Return the tokens of lower-cased ``text``, all sentences in one list."""
    return [token for sentence in split_sentences(text) for token in _words(sentence)]


def _words(sentence: str) -> list[str]:
    for pattern, replacement in _BEFORE_PADDING:
        sentence = pattern.sub(replacement, sentence)
    sentence = f" {sentence} "
    for pattern, replacement in _AFTER_PADDING:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()
