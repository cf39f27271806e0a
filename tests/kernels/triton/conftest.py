"""The tests of this folder run under Triton's interpreter, which has to be on before Triton is imported.

So a plain run leaves them out, and ``test_interpreter.py`` runs each file in an interpreter of its own. To work on one:
``TRITON_INTERPRET=1 pytest tests/kernels/triton/test_dense.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT_INTERPRETER = ("test_interpreter.py", "test_not_interpreted.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the interpreted files to ``test_interpreter.py``, and that one out of its own runs."""
    if collection_path.parent != Path(__file__).parent or not collection_path.name.startswith("test_"):
        return None
    interpreted = collection_path.name not in WITHOUT_INTERPRETER
    start = config.invocation_params.dir
    named = any((start / argument.split("::")[0]).resolve() == collection_path for argument in config.args)
    if named and interpreted and not INTERPRETED:
        raise pytest.UsageError(f"run {collection_path.name} with TRITON_INTERPRET=1")
    return True if interpreted != INTERPRETED else None


@pytest.fixture(scope="session", autouse=True)
def _interpret_once() -> None:
    """Triton's interpreter replaces its language anew at every call of a device function; here once, for good.

    That is a third of the time of these tests, and nothing in this process compiles.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    replaced: dict[tuple[bool, bool], object] = {}

    class Kept:
        def restore(self) -> None:
            """Leave the language as it is."""

    def replace_once(function: Any) -> Kept:
        seen = [entry for entry in function.__globals__.values() if isinstance(entry, ModuleType)]
        key = (interpreter.tl in seen, interpreter.tl.core in seen)
        if key not in replaced:
            replaced[key] = replace(function)
        return Kept()

    interpreter._patch_lang = replace_once


@pytest.fixture(autouse=True)
def _triton_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from vislm.kernels.backends import BACKENDS
    from vislm.kernels.backends import triton as backend

    monkeypatch.setitem(BACKENDS, "triton", backend)  # pyright: ignore[reportArgumentType]
