"""Peak memory of the cases of a setting, measured in a fresh process.

On the CPU that is the growth of the process's resident memory: its high-water mark is reset before a call and read
after it (Linux only). The process runs nothing else, gives freed memory back to the system at once (so that what an
earlier call left behind hides nothing), and makes every call once before the one that counts (so that libraries,
compiled code and thread pools are loaded). On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from vislm.bench.kernels.cases import Case, Setting
from vislm.bench.kernels.plan import DIRECTIONS, Direction, calls_of, cases_of
from vislm.kernels.scratch import release_scratch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ALWAYS_RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""Environment of a process whose C library gives freed memory back at once."""
Peaks = Mapping[str, Mapping[Direction, int]]


def peak_memory(setting: Setting) -> Peaks:
    """Return case -> direction -> bytes: the largest sum of what a call allocates and of the masks kept for it.

    Query, key and value are not counted. Empty where the system does not tell (CPU memory elsewhere than on Linux), and
    for a setting that the process did not survive.
    """
    if setting.device == "cpu" and not _CLEAR.exists():
        return {}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(setting))],
        env=os.environ | ALWAYS_RETURN,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def main(order: str) -> None:
    """Measure the cases of a setting, given as JSON, and print their peaks as one line of JSON."""
    given = json.loads(order)
    setting = Setting(**given | {"grid": tuple(given["grid"]), "peers": tuple(given["peers"])})
    torch.set_num_threads(setting.threads)
    measure = resident_peak if setting.device == "cpu" else _cuda_peak
    cases = [case for case in cases_of(setting) if isinstance(case, Case)]
    peaks: dict[str, dict[str, int]] = {case.name: {} for case in cases}
    for direction in DIRECTIONS:
        calls = calls_of(cases, direction)
        for case in cases:
            if case.name in calls:
                with contextlib.suppress(RuntimeError):  # a peer that cannot run here has no figures
                    peaks[case.name][direction] = case.held + measure(calls[case.name])
    print(json.dumps(peaks))


def resident_peak(call: Callable[[], object]) -> int:
    """Return by how many bytes the process's resident memory grows at most during the second call."""
    call()
    release_scratch()  # it would count as there before the call
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak)


def _cuda_peak(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.argv[1])
