"""All LMM benchmarks alike: whole runs of the embedded model, options by text, mutated files."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from lmm_folders import FOLDERS

from vislm.errors import UnknownName, VislmError
from vislm.eval.benchmarks import BENCHMARKS, LMM_BENCHMARKS, load_benchmark, options, read_options
from vislm.eval.checks import check_folder
from vislm.eval.running.runner import rescore, run
from vislm.eval.specs import benchmark_names, open_benchmark

OPTIONS = {"mmbench": {"scoring": "likelihood"}, "scienceqa": {"images_only": False}, "textvqa": {"ocr": True}}


@pytest.fixture(scope="module")
def lmm():
    from vislm.lmm.model import load_lmm

    return load_lmm("vislm-tiny")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_embedded_model_runs_it(name, lmm, tmp_path) -> None:
    task = load_benchmark(name, FOLDERS[name](tmp_path), **OPTIONS.get(name, {}))
    results = run(task, lmm, tmp_path / "out", batch_size=4, limit=3)
    assert results["n"] == 3
    assert results["n_missing"] == 0
    again = rescore(task, tmp_path / "out" / "predictions.jsonl", allow_partial=True)
    assert again["metrics"] == results["metrics"]


@pytest.mark.parametrize("name", LMM_BENCHMARKS)
def test_what_every_benchmark_states(name, tmp_path) -> None:
    task = load_benchmark(name, FOLDERS[name](tmp_path), control="grey")
    assert task.name == name
    assert task.control == "grey"
    assert task.max_new_tokens >= 8
    ids = [s.id for s in task.samples]
    assert len(ids) == len(set(ids))
    assert all(isinstance(v, str | int | float | bool | list) for v in task.protocol.values())
    assert "warnings" in task.aggregate({}) or name == "pope"
    assert task.groups({}) == {}


@pytest.mark.parametrize("name", LMM_BENCHMARKS)
def test_options(name, tmp_path) -> None:
    known = options(name)
    assert "control" not in known
    with pytest.raises(UnknownName, match=f"option of {name}"):
        load_benchmark(name, FOLDERS[name](tmp_path), nonsense=1)
    assert read_options(name, "") == {}


def test_names(tmp_path) -> None:
    assert benchmark_names() == BENCHMARKS
    assert BENCHMARKS.keys() >= {*LMM_BENCHMARKS, "chair", "pope"}
    task = open_benchmark("pope: parser=pai , suffix=short", FOLDERS["pope"](tmp_path), control="grey")
    assert (task.protocol["parser"], task.protocol["suffix"], task.control) == ("pai", "short", "grey")
    with pytest.raises(UnknownName, match="did you mean 'mmbench'"):
        load_benchmark("mmbnech", tmp_path)


VALUES = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    b'"../x"',
    b"NaN",
    b'"\\ud800"',
    b"\xff",
    b"\t",
    b"9" * 30,
]


def _mutated(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    end = start + rng.randrange(30)
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[end:]
    if kind == 2:
        return content[:start] + content[start:end] * 2 + content[end:]
    spans = [m.span() for m in re.finditer(rb'"[^"]*"|-?\d+|\[[^\[\]]*\]', content)] or [(start, end)]
    first, last = rng.choice(spans)
    return content[:first] + rng.choice(VALUES) + content[last:]


@pytest.mark.parametrize("name", FOLDERS)
def test_mutated_files_never_crash_a_reader(name, tmp_path) -> None:
    rng = random.Random(0)
    root: Path = FOLDERS[name](tmp_path / "data")
    files = sorted(f for f in root.rglob("*") if f.suffix in (".json", ".txt", ".tsv"))
    noticed = 0
    for _ in range(60):
        file = rng.choice(files)
        sound = file.read_bytes()
        file.write_bytes(_mutated(sound, rng))
        try:
            report = check_folder(name, root)
            noticed += bool(report.faults)
        except VislmError:
            noticed += 1
        file.write_bytes(sound)
    assert noticed > 10
