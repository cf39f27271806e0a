"""Tokenising captions for BLEU, ROUGE and CIDEr: the official way needs Java, the regex way is close and needs nothing.

"ptb" runs Stanford's PTBTokenizer, as the official COCO scorer does. "regex" applies the Penn Treebank rules of
``vislm.eval.captions.tokenize`` (contractions split, hyphens kept) to Unicode quotes and dashes, too. Both make lower
case and remove the same punctuation tokens. Results name the tokenizer.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vislm.errors import UnknownName, UsageError
from vislm.eval.captions.tokenize import tokenize

TOKENIZERS = ("regex", "ptb")
REMOVED = frozenset(
    ["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
JAR = "stanford-corenlp-3.4.1.jar"
"""Comes with PyPI's pycocoevalcap."""
_PLAIN = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "–": " -- ",
        "—": " -- ",
        "…": " ... ",
        "(": " ",
        ")": " ",
        "{": " ",
        "}": " ",
    }
)
_FULL_STOPS = re.compile(r"\.+")
_SECONDS = 600


def tokenise(captions: Sequence[str], tokenizer: str = "regex") -> list[list[str]]:
    """Return the words of every caption.

    Args:
        captions: texts; line breaks count as spaces.
        tokenizer: regex, or ptb (Java 8 or later and the jar of pycocoevalcap).

    Raises:
        UnknownName: no such tokenizer.
        UsageError: ptb without Java or without the jar, or Java failed.
    """
    if tokenizer == "regex":
        return [_regex(caption) for caption in captions]
    if tokenizer != "ptb":
        raise UnknownName("caption tokenizer", tokenizer, TOKENIZERS)
    lines = _stanford([" ".join(caption.split()) for caption in captions])
    return [[word for word in line.split() if word not in REMOVED] for line in lines]


def _regex(caption: str) -> list[str]:
    text = " ".join(caption.translate(_PLAIN).lower().split())
    return [word for word in tokenize(text) if word not in REMOVED and not _FULL_STOPS.fullmatch(word)]


def _stanford(lines: Sequence[str]) -> list[str]:
    java, jar = shutil.which("java"), _jar()
    if java is None or jar is None:
        missing = "a Java runtime" if java is None else f"{JAR} (pip install pycocoevalcap, or set VISLM_PTB_JAR)"
        raise UsageError(f"tokenizer='ptb' needs {missing}; or use tokenizer='regex'")
    if not lines:
        return []
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command += ["-encoding", "UTF-8"]
    text = "\n".join(lines) + "\n"
    try:
        done = subprocess.run(
            command, input=text.encode(errors="replace"), capture_output=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"Stanford's tokenizer failed ({error}); use tokenizer='regex'") from error
    tokenised = done.stdout.decode(errors="replace").split("\n")[: len(lines)]
    if len(tokenised) != len(lines):
        raise UsageError(
            f"Stanford's tokenizer returned {len(tokenised)} lines for {len(lines)}; use tokenizer='regex'"
        )
    return tokenised


def _jar() -> Path | None:
    named = os.environ.get("VISLM_PTB_JAR")
    if named:
        return Path(named) if Path(named).is_file() else None
    package = importlib.util.find_spec("pycocoevalcap")
    places = (package and package.submodule_search_locations) or []
    return next((jar for place in places if (jar := Path(place) / "tokenizer" / JAR).is_file()), None)
