"""kill -9 at random moments of an evaluation, from its first to its last system call.

A driver with everything imported forks the evaluations, so that hundreds of kills take seconds; each is a real process
with its own loader threads, killed from outside. Between the kills the rows are checked; at the end the whole folder
is compared with that of an evaluation that nothing disturbed.

    python kills.py KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from outcome import Outcome, Stopwatch, in_own_process

SCENES, SCENE_SEED = 16, 99


def trial(kills: int, seed: int) -> Outcome:
    """Kill evaluations ``kills`` times or a few more."""
    watch = Stopwatch()
    found = in_own_process("kills.py", kills, seed)
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("kill -9 during an evaluation", found.get("kills", 0), found, watch.seconds, failures)


class Evaluation:
    """One run folder that is killed until it is done."""

    def __init__(self, folder: Path, out: Path, options: dict[str, int], slow_disk: bool = False) -> None:
        self.folder, self.out, self.options, self.slow_disk = folder, out, options, slow_disk
        self.asked = out.with_suffix(".asked")
        self.kills, self.torn, self.seen, self.failures = 0, 0, {}, []

    def start(self) -> int:
        """Fork a process that runs or resumes the evaluation; return its id."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if self.slow_disk:
                    os.write = _write_slowly
                self.evaluate()
                code = 0
            finally:
                os._exit(code)
        return child

    def evaluate(self) -> None:
        """Run to the end, in this process, noting each sample that is asked."""
        from vislm.eval.benchmarks import load_benchmark
        from vislm.eval.running.runner import run

        run(load_benchmark("pope", self.folder), _Noting(self.asked), self.out, **self.options)

    def check_rows(self) -> None:
        """Compare the whole lines with those seen before the last kill."""
        rows = {}
        for path in self.out.glob("predictions*.jsonl"):
            *lines, rest = path.read_bytes().split(b"\n")
            self.torn += bool(rest)
            for line in lines:
                row = json.loads(line)
                if row["id"] in rows:
                    self.failures.append(f"{self.options}: {row['id']} is scored twice after kill {self.kills}")
                rows[row["id"]] = line
        lost = [i for i, line in self.seen.items() if rows.get(i) != line]
        if lost:
            self.failures.append(f"{self.options}: {len(lost)} rows lost or changed by kill {self.kills}")
        self.seen = rows

    @property
    def repeated(self) -> int:
        """Samples that were asked more than once."""
        return sum(n - 1 for n in Counter(self.asked.read_text().splitlines()).values()) if self.asked.exists() else 0


def _write_slowly(descriptor: int, data: bytes, *, write: Callable[[int, bytes], int] = os.write) -> int:
    """Write a few bytes and take a while, so that kills fall between them and leave torn lines."""
    time.sleep(0.0003)
    return write(descriptor, data[:97])


class _Noting:
    """A subject that answers from the pixels, slowly enough to be killed, and notes what it was asked."""

    def __init__(self, asked: Path) -> None:
        self._asked = asked

    def fingerprint(self) -> dict:
        return {"model": "noting"}

    def respond(self, batch, *, max_new_tokens):
        with self._asked.open("a") as file:
            file.write("".join(f"{a.sample.id}\n" for a in batch))
        time.sleep(0.004)
        sums = [sum(a.images[0].tobytes()) + len(a.sample.prompt) for a in batch]
        return [{"text": "Yes." if s % 2 else "No.", "seconds": 0.001} for s in sums]


def main(kills: int, seed: int) -> dict:
    from vislm.data.scenes import write_scenes

    import_module("vislm.eval.running.runner")  # everything is imported before the first fork
    rng, total, repeated, torn, per_kill, done, failures = random.Random(seed), 0, 0, 0, 0.0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_scenes(Path(scratch) / "scenes", SCENES, SCENE_SEED)
        whole = Evaluation(folder, Path(scratch) / "whole", {"batch_size": 5, "workers": 1})
        began = time.perf_counter()
        whole.evaluate()
        length = time.perf_counter() - began
        expected = _end(whole.out)
        while total < kills:
            options = {"batch_size": rng.choice([1, 3, 8, 32]), "workers": rng.choice([0, 1, 3])}
            one = Evaluation(folder, Path(scratch) / f"killed{done}", options, slow_disk=done % 2 == 0)
            _kill_until_done(one, rng, length * (2 if one.slow_disk else 1))
            torn += one.torn
            total, done = total + one.kills, done + 1
            repeated += one.repeated
            if one.kills:
                per_kill = max(per_kill, one.repeated / (one.kills * options["batch_size"]))
            failures += one.failures
            if _end(one.out) != expected:
                failures.append(f"{options}: rows or metrics differ from those of an undisturbed run")
    return {
        "kills": total,
        "runs finished": done,
        "rows lost, changed or scored twice": len(failures),
        "torn lines repaired": torn,
        "samples asked again": repeated,
        "batches repeated per kill, at most": round(per_kill, 2),
        "failures": failures + ([f"{per_kill} batches repeated per kill"] if per_kill > 1 else []),
    }


def _kill_until_done(one: Evaluation, rng: random.Random, length: float) -> None:
    while True:
        child = one.start()
        deadline = time.perf_counter() + rng.random() * length * rng.choice([0.2, 0.6, 1.2])
        while time.perf_counter() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.0005)
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                one.failures.append(f"{one.options}: a resumed run failed after kill {one.kills}")
            one.check_rows()
            return
        one.kills += 1
        one.check_rows()


def _end(out: Path) -> tuple[bytes, dict] | None:
    """Return rows and metrics of a finished run."""
    if not (out / "results.json").is_file():
        return None
    return (out / "predictions.jsonl").read_bytes(), json.loads((out / "results.json").read_text())["metrics"]


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
