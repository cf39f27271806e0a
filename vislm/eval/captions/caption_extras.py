"""METEOR and SPICE, by the official Java programs of PyPI's pycocoevalcap; skipped where they cannot run.

Source: Denkowski and Lavie (METEOR 1.5), 2014; Anderson et al., "SPICE", ECCV 2016, arXiv 1607.08822.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from vislm.errors import UnknownName

EXTRAS = ("METEOR", "SPICE")
_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def unavailable(name: str) -> str | None:
    """Return why a metric cannot run here, or None. Nothing is downloaded: SPICE's models must be there.

    Raises:
        UnknownName: no such metric.
    """
    if name not in EXTRAS:
        raise UnknownName("extra caption metric", name, EXTRAS)
    if shutil.which("java") is None:
        return "no Java runtime"
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        return "pycocoevalcap is not installed"
    library = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    missing = [jar for jar in _MODELS if not (library / jar).is_file()]
    return f"Stanford's models are not in {library}: {', '.join(missing)}" if name == "SPICE" and missing else None


def extra_score(name: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR or SPICE of tokenised captions joined by spaces; call :func:`unavailable` first."""
    module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    scorer = getattr(module, name.capitalize())()
    truth = {i: list(texts) for i, texts in enumerate(references)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            score, _ = scorer.compute_score(truth, {i: [text] for i, text in enumerate(hypotheses)})
    finally:
        process = getattr(scorer, "meteor_p", None)  # METEOR's Java process, whose pipes the package leaves open
        for pipe in (process.stdin, process.stdout, process.stderr) if process else ():
            pipe.close()
    return float(score)
