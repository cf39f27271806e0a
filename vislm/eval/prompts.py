"""The words that are put behind a question. They move scores by several points, so every result names its own."""

from __future__ import annotations

from vislm.errors import UnknownName

SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA's for short answers; lmms-eval uses the same."""
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's for multiple choice."""
SUFFIXES = {
    "none": "",
    "short": SHORT,
    "yes-no": " Please answer yes or no.",
    "one-word": " Please answer this question with one word.",
    "letter": LETTER,
}
"""Name -> text. none: the bare question (POPE's own files); short: LLaVA and lmms-eval; yes-no: MME's own;
one-word: VCD and what derives from it."""


def suffix_text(name: str) -> str:
    """Return the text of a suffix.

    Raises:
        UnknownName: no such suffix.
    """
    if name not in SUFFIXES:
        raise UnknownName("prompt suffix", name, SUFFIXES)
    return SUFFIXES[name]
