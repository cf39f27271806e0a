"""A disk that fills up at a random byte: what was finished stays, and the run goes on once there is room.

A limit on the size of files stands for the disk: the system refuses to write beyond it in the middle of a row, of the
results, or of the fingerprint.

    python disks.py CASES SEED
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from outcome import Outcome, Stopwatch, in_own_process
from pictures import _Digests, _Pixels

from vislm.errors import RunFolderError


def trial(cases: int, seed: int) -> Outcome:
    """Run out of room ``cases`` times."""
    watch = Stopwatch()
    found = in_own_process("disks.py", cases, seed)
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("full disk during an evaluation", found.pop("cases", 0), found, watch.seconds, failures)


def main(cases: int, seed: int) -> dict:
    from vislm.data.scenes import write_scenes

    run = import_module("vislm.eval.running.runner").run
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as it does on a full disk
    rng, failures, refused = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        data = write_scenes(Path(scratch) / "data", 24, 1)
        benchmark = _Pixels(tuple(sorted((data / "images").glob("*.png"))))
        run(benchmark, _Digests(), Path(scratch) / "whole", batch_size=3)
        expected = (Path(scratch) / "whole" / "predictions.jsonl").read_bytes()
        for number in range(cases):
            out, limit = Path(scratch) / str(number), int(math.exp(rng.uniform(0, math.log(len(expected) + 500))))
            code = _limited(limit, lambda out=out: run(benchmark, _Digests(), out, batch_size=3))
            refused += code == 3
            if code not in (0, 3):
                failures.append(f"limit {limit}: exit code {code}, not our error")
            kept = _whole_lines(out / "predictions.jsonl")
            if not expected.startswith(kept):
                failures.append(f"limit {limit}: rows that were finished are damaged")
            run(benchmark, _Digests(), out, batch_size=3)
            if (out / "predictions.jsonl").read_bytes() != expected or list(out.glob(".*.tmp-*")):
                failures.append(f"limit {limit}: the resumed run differs")
    return {"cases": cases, "refused": refused, "rows lost, damaged folders": len(failures), "failures": failures}


def _limited(limit: int, action) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            action()
            code = 0
        except RunFolderError as error:
            code = 3 if "cannot write" in str(error) and "run again to resume" in str(error) else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
