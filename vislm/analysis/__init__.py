"""What attention does inside a ViT or a large multimodal model (LMM), measured without attention matrices.

Functions of tensors, one idea each (:mod:`~vislm.analysis.sinks`, :mod:`~vislm.analysis.entropy`,
:mod:`~vislm.analysis.distance`, ...), a recorder that takes what they need while a model runs
(:mod:`~vislm.analysis.recorder`, :mod:`~vislm.analysis.vision`), and :func:`analyze_lmm` / :func:`analyze_vit` that run
them all. Results are plain tensors ``[layer, head, ...]`` with a JSON header (:class:`Analysis`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_EXPORTS = {
    "Analysis": "vislm.analysis.results",
    "Knockout": "vislm.analysis.knockout",
    "Recorder": "vislm.analysis.recorder",
    "analyze_lmm": "vislm.analysis.run_lmm",
    "analyze_vit": "vislm.analysis.run_vit",
}

__all__ = ["Analysis", "Knockout", "Recorder", "analyze_lmm", "analyze_vit"]

if TYPE_CHECKING:
    from vislm.analysis.knockout import Knockout
    from vislm.analysis.recorder import Recorder
    from vislm.analysis.results import Analysis
    from vislm.analysis.run_lmm import analyze_lmm
    from vislm.analysis.run_vit import analyze_vit


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'vislm.analysis' has no attribute {name!r}; it offers {', '.join(__all__)}")
