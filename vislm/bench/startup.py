"""How long a fresh interpreter needs before the package is of use."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

CASES = {
    "bare interpreter": ["-c", "pass"],
    "import vislm": ["-c", "import vislm"],
    "vislm --help": ["-m", "vislm", "--help"],
}


def startup_lines(runs: int) -> Iterator[str]:
    """Yield a table of median, least and largest seconds of ``runs`` fresh interpreters of each kind, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(runs + 1):
        for name, arguments in CASES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    yield f"{'command':<18} {'median s':>9} {'min':>7} {'max':>7}"
    for name, values in seconds.items():
        values = values[1:]  # the first one warms the file cache
        yield f"{name:<18} {statistics.median(values):>9.3f} {min(values):>7.3f} {max(values):>7.3f}"
