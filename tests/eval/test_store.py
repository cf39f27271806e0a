"""The run folder's files: appending, merging, repairing, refusing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import RunFolderError
from vislm.eval.running.store import (
    ROWS,
    collect,
    open_folder,
    open_rows,
    part_name,
    read_json,
    read_rows,
    write_results,
)

FINGERPRINT = {"a": 1}


def test_any_answer_survives(tmp_path) -> None:
    texts = ["line\nbreak", "\u2028", "\ud800", "\0", "", "é", '"}{', "\x85"]
    with open_folder(tmp_path, FINGERPRINT), open_rows(tmp_path / ROWS) as file:
        file.add({"id": str(i), "text": t} for i, t in enumerate(texts))
    with open_folder(tmp_path, FINGERPRINT) as rows:
        assert [row["text"] for row in rows.values()] == texts


@given(st.lists(st.text(), max_size=5), st.text())
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, texts, last) -> None:
    path = tmp_path_factory.mktemp("cut") / ROWS
    with open_rows(path) as file:
        file.add({"id": str(i), "text": t} for i, t in enumerate([*texts, last]))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert len(read_back(path)) == len(texts)
    path.write_bytes(data[: len(data) // 2])
    assert [json.loads(line) for line in data.splitlines()][: len(kept := read_back(path))] == kept


def read_back(path) -> list:
    with open_rows(path):
        pass
    return list(read_rows(path).values())


def test_long_torn_lines_are_cut(tmp_path) -> None:
    (tmp_path / ROWS).write_bytes(b'{"id": "1", "text": ""}\n' + b"x" * 200_000)
    assert [row["id"] for row in read_back(tmp_path / ROWS)] == ["1"]
    (tmp_path / ROWS).write_bytes(b"x" * 200_000)
    assert read_back(tmp_path / ROWS) == []


def test_files_of_several_processes_are_merged_once(tmp_path) -> None:
    """The second merge finds a part whose rows are there already: the kill came before its removal."""
    (tmp_path / "run.json").write_text(json.dumps(FINGERPRINT))
    (tmp_path / ROWS).write_text('{"id": "2", "text": ""}\n')
    part = tmp_path / part_name(1)
    for _ in range(2):
        part.write_text('{"id": "3", "text": ""}\n{"id": "1", "text": ""}\n{"id": "9", "te')
        assert list(collect(tmp_path, ["1", "2", "3"])) == ["1", "2", "3"]
        assert not part.exists()
    assert [json.loads(line)["id"] for line in (tmp_path / ROWS).read_text().splitlines()] == ["1", "2", "3"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path) -> None:
    (tmp_path / ".results.json.tmp-4711").write_text("half")
    with open_folder(tmp_path, FINGERPRINT):
        assert not (tmp_path / ".results.json.tmp-4711").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]\n", "line 1 is damaged"),
        (b'{"text": "no id"}\n', "line 1 is damaged"),
        (b'{"id": 5, "text": ""}\n', "id 5 is no text"),
        (b'{"id": "5", "text": null}\n', "text None is no text"),
        (b'{"id": "5", "text": "", "candidates": {"yes": "1"}}\n', "no numbers by name"),
        (b"[" * 100_000 + b"\n", "line 1 is damaged"),
        (b'{"id": "1", "text": ""}\n' * 2, "an id twice"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, content, message) -> None:
    (tmp_path / ROWS).write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        read_rows(tmp_path / ROWS)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', "\0", "[" * 100_000])
def test_damaged_fingerprints_are_refused(tmp_path, content) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json"), open_folder(tmp_path, FINGERPRINT):
        pass
    with pytest.raises(RunFolderError, match="cannot read"):
        read_json(tmp_path / "missing.json")


def test_a_full_disk_costs_nothing_that_was_there(tmp_path) -> None:
    """The file-size limit of a child process stands for the full disk."""
    with open_rows(tmp_path / ROWS) as file:
        file.add([{"id": "1", "text": "x" * 2000}])
    write_results(tmp_path, {"old": True})
    ended = subprocess.run([sys.executable, "-c", FAILING, tmp_path], capture_output=True, text=True, check=True)
    messages = ended.stdout.splitlines()
    assert [m.split(str(tmp_path))[1].split(":")[0] for m in messages] == [f"/{ROWS}", "/results.json"]
    assert all("File too large; finished samples are kept" in m for m in messages), messages
    assert json.loads((tmp_path / "results.json").read_text()) == {"old": True}
    assert [row["id"] for row in read_back(tmp_path / ROWS)] == ["1"]
    assert not list(tmp_path.glob(".*tmp*"))


FAILING = """
import resource, signal, sys
from pathlib import Path
from vislm.errors import RunFolderError
from vislm.eval.running.store import ROWS, open_rows, write_results
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
def append():
    with open_rows(folder / ROWS) as file:
        file.add([{"id": "2", "text": "y" * 9000}])
for action in (append, lambda: write_results(folder, {"new": "z" * 9000})):
    try:
        action()
    except RunFolderError as error:
        print(error)
"""
