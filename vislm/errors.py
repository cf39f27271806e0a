"""Every error that a user's input can cause, in one place.

They derive from ``ValueError`` or ``RuntimeError``; the command line prints their message without a traceback and
exits with 2 (usage) for :class:`UsageError` kinds and 1 (failure) for the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VislmError(Exception):
    """Base of all errors that vislm raises on purpose."""


class UsageError(VislmError, ValueError):
    """A wrong argument: says what was given, what was expected and what to do."""


class UnknownName(UsageError):
    """A name that no registry, option list or configuration knows; suggests the nearest valid names."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.valid = kind, name, sorted(valid)
        near = difflib.get_close_matches(name, self.valid, n=3, cutoff=0.5)
        message = f"unknown {kind} {name!r}"
        if near:
            message += f"; did you mean {' or '.join(repr(n) for n in near)}?"
        message += f" Valid: {', '.join(self.valid) or 'none'}."
        super().__init__(f"{message} {hint}".strip())


class ImageError(VislmError, ValueError):
    """An image that cannot be read safely; carries the file's name and the reason."""

    def __init__(self, source: object, reason: str) -> None:
        self.source, self.reason = str(source), reason
        super().__init__(f"cannot use image {self.source}: {reason}")


class AnnotationError(VislmError, ValueError):
    """An annotation or result file with faults; lists the first of them and the total."""


class CheckpointError(VislmError, RuntimeError):
    """Weights or a checkpoint folder that cannot be loaded."""


class TrainingError(VislmError, RuntimeError):
    """A training that cannot go on: a loss that is not finite, or a model that fails its check."""


class BackendUnavailable(VislmError, RuntimeError):
    """A kernel backend that cannot run the request, with the reason."""


class PlanConflict(UsageError):
    """Interventions that contradict each other or the model; names both owners."""


class RunFolderError(VislmError, RuntimeError):
    """A run folder that belongs to another run, or that another process is using."""
