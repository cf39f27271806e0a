"""Several processes that share a run: the rows are those of one process, whatever is killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import answerer
import pytest
from answerer import Oracle

from vislm.errors import UsageError, VislmError
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.running.processes import World, launched, own_device
from vislm.eval.running.runner import run


def launch(folder: Path, out: Path, size: int, delay: float = 0.0, *knows: Path) -> list[subprocess.Popen]:
    """Start processes that answer as an oracle does."""
    return start([answerer.__file__, folder, out, delay, *knows], size)


def start(arguments: Sequence[object], size: int) -> list[subprocess.Popen]:
    """Start Python as torchrun and accelerate do: by environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    errors = [p.communicate(timeout=120)[1] for p in processes]
    return [p.returncode for p in processes], errors


@pytest.mark.slow
def test_four_processes_killed_and_resumed_by_two_do_what_one_does(scenes, tmp_path) -> None:
    expected = run(load_benchmark("pope", scenes), Oracle.of_folder(scenes), tmp_path / "one")
    four, out = launch(scenes, tmp_path / "many", 4, delay=0.4), tmp_path / "many"
    while all(p.poll() is None for p in four) and sum(f.stat().st_size for f in out.glob("predictions.*.jsonl")) < 3000:
        time.sleep(0.05)
    for process in four:
        process.kill()
    ended(four)
    assert len(list(out.glob("predictions.0*.jsonl"))) >= 2
    assert not (out / "results.json").exists()
    before = {json.loads(x)["id"] for f in out.glob("predictions.*.jsonl") for x in f.read_text().splitlines()[:-1]}
    codes, errors = ended(launch(scenes, out, 2))
    assert codes == [0, 0], errors
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"] == json.loads(json.dumps(expected["metrics"]))
    assert (results["processes"], results["n_missing"]) == (2, 0)
    assert before <= {json.loads(x)["id"] for x in (out / "predictions.jsonl").read_text().splitlines()}
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "one" / "predictions.jsonl").read_bytes()
    assert not list(out.glob("predictions.0*"))


@pytest.mark.slow
def test_the_command_does_the_same_in_one_process_and_in_two(scenes, tmp_path) -> None:
    command = ["-m", "vislm.eval", "pope:split=popular", "--data", scenes, "--limit", 20, "--batch-size", 3, "--out"]
    for size in (1, 2):
        codes, errors = ended(start([*command, tmp_path / str(size)], size))
        assert codes == [0] * size, errors
    one, two = (json.loads((tmp_path / size / "results.json").read_text()) for size in "12")
    assert (one["processes"], two["processes"], two["n"]) == (1, 2, 20)
    assert one["metrics"].keys() == {"popular", "mean", "oracles"}
    rows = [(tmp_path / size / "predictions.jsonl").read_text().splitlines() for size in "12"]
    kept = [
        [{k: row[k] for k in ("id", "text", "answer", "score", "truth")} for row in map(json.loads, r)] for r in rows
    ]
    assert kept[0] == kept[1]
    assert one["metrics"]["popular"]["accuracy"] == two["metrics"]["popular"]["accuracy"]


@pytest.mark.slow
def test_one_process_with_a_broken_picture_ends_the_others(scenes, tmp_path) -> None:
    broken = Path(shutil.copytree(scenes, tmp_path / "broken"))
    (broken / "images" / "000001.png").unlink()
    codes, errors = ended(launch(broken, tmp_path / "out", 2, 0.0, scenes))
    assert codes == [1, 1]
    assert any("000001.png: no such file" in e for e in errors)


def test_a_single_process_needs_no_network(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.gather(3) == [3]
        assert world.first(lambda: "x") == "x"
        assert world.share([1, 2, 3]) == [1, 2, 3]


def test_every_item_belongs_to_exactly_one_process() -> None:
    items = list(range(11))
    shares = [World(rank, 4).share(items) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) == 1


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_contradictory_launchers_are_refused(monkeypatch, rank, size) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=r"RANK|WORLD_SIZE"), launched():
        pass


def test_each_process_gets_a_card(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [own_device(d) for d in ("cuda", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device("cuda") == "cuda"


def test_a_partner_that_is_gone_is_named(monkeypatch) -> None:
    def gone(*_, **__):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_gather_object", gone)
    with pytest.raises(VislmError, match="another process of this run has ended"):
        World(1, 2).gather(None)
