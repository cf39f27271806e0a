"""Reading the chosen option out of an answer to a multiple-choice question. The rules differ; results name theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vislm.errors import UnknownName

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCIENCEQA_RULES = ("llava", "lmms-eval")
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?i:answer\s+is)[\s:*(]*([A-Z])(?![A-Za-z])")
_LAST = 4  # a letter further from the end is more likely an article than an answer


def scienceqa_answer(text: str, rule: str = "llava") -> str | None:
    """Return the letter that an answer to ScienceQA chooses, or None.

    "llava": the answer is one letter A to E, or begins with such a letter, a period and a space, or says exactly once
    "The answer is X" followed by any character. "lmms-eval": one letter in either case, or a capital and a period.

    Raises:
        UnknownName: no such rule.
    """
    if rule == "llava":
        if text in tuple("ABCDE"):
            return text
        if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
            return text[0]
        stated = re.findall(r"The answer is ([A-Z]).", text)
        return stated[0] if len(stated) == 1 else None
    if rule == "lmms-eval":
        text = text.strip()
        if len(text) == 1 and text.upper() in LETTERS:
            return text.upper()
        return text[0] if text[1:2] == "." and text[0] in LETTERS else None
    raise UnknownName("ScienceQA rule", rule, SCIENCEQA_RULES)


def mmbench_answer(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that an answer to MMBench chooses, by VLMEvalKit's rules without a judge, or None.

    Args:
        text: what the model said.
        options: letter -> text of the option.
    """
    words = text.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST:
        return named[0]
    stated = {letter for letter in _STATED.findall(text) if letter in options}
    if len(stated) == 1:
        return stated.pop()
    answer = text.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    quoted = [letter for letter, option in options.items() if option.lower() in answer]
    return quoted[0] if len(quoted) == 1 else None
