"""Every other file of this folder, each in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = sorted(
    path.name
    for path in FOLDER.glob("test_*.py")
    if path.name not in ("test_interpreter.py", "test_not_interpreted.py")
)


@pytest.mark.parametrize("name", FILES)
def test_file(name: str) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / name)]
    ran = subprocess.run(command, env=inherited | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-2000:]
