"""kill -9 of ``python -m vislm.eval`` with the embedded model, at random moments from start-up to the last row.

python commands.py KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from outcome import Outcome, Stopwatch, in_own_process


def trial(kills: int, seed: int) -> Outcome:
    """Kill the command ``kills`` times or a few more."""
    watch = Stopwatch()
    found = in_own_process("commands.py", kills, seed)
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("kill -9 of vislm eval, embedded model", found.pop("kills", 0), found, watch.seconds, failures)


def main(kills: int, seed: int) -> dict:
    from vislm.data.scenes import write_scenes

    rng, total, done, failures = random.Random(seed), 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        data = write_scenes(Path(scratch) / "data", 60, 3)
        began = time.perf_counter()
        if _start(data, Path(scratch) / "whole").wait() != 0:
            raise SystemExit("the undisturbed run failed")
        length = time.perf_counter() - began
        expected = _answers(Path(scratch) / "whole")
        while total < kills:
            out, done = Path(scratch) / f"killed{done}", done + 1
            while True:
                process, deadline = _start(data, out), time.perf_counter() + rng.random() * 1.2 * length
                while process.poll() is None and time.perf_counter() < deadline:
                    time.sleep(0.02)
                if process.poll() is not None:
                    break
                process.kill()
                process.wait()
                total += 1
            if process.returncode != 0:
                failures.append(f"a resumed command ended with {process.returncode}")
            elif _answers(out) != expected:
                failures.append("answers differ from those of an undisturbed run")
    return {
        "kills": total,
        "runs finished": done,
        "lost, repeated or other answers": len(failures),
        "failures": failures,
    }


def _start(data: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "vislm.eval", "pope", "--data", data, "--out", out, "--batch-size", "8"]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _answers(out: Path) -> tuple[list[tuple], dict]:
    """Return what must not depend on kills; logits may differ in their last digits with the batch."""
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    counts = {split: [metrics[split][k] for k in ("TP", "FP", "TN", "FN")] for split in ("random", "adversarial")}
    return [(r["id"], r["text"], r["score"], r["visual_tokens_kept"]) for r in rows], counts


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
