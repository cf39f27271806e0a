"""Atomic writing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from vislm.files import atomic_write, sha256


def test_an_error_keeps_the_old_content_and_leaves_no_litter(tmp_path) -> None:
    path = tmp_path / "a" / "file.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_full_disk_keeps_the_old_content(tmp_path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from vislm.files import atomic_write
with atomic_write({str(path)!r}, "wb") as file:
    file.write(bytes(100_000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_permissions_follow_the_umask(tmp_path) -> None:
    with atomic_write(tmp_path / "f") as file:
        file.write("x")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~umask


def test_sha256(tmp_path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
