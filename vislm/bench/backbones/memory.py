"""Peak memory of a model, measured in a fresh process; see :mod:`vislm.bench.kernels.memory` for how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vislm.bench.backbones.calls import model_call
from vislm.bench.backbones.models import Model
from vislm.bench.kernels.memory import ALWAYS_RETURN, resident_peak


@dataclass(frozen=True)
class Order:
    """What a process is to measure: one image of each size through one model."""

    name: str
    library: str
    sizes: Sequence[int]
    training: bool
    threads: int


def peak_memory(model: Model, sizes: Sequence[int], training: bool, threads: int) -> dict[int, int]:
    """Return size -> bytes at most in use beside weights and image, with one image.

    Empty where the system does not tell (elsewhere than on Linux), and for a model that the process did not survive.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}
    order = Order(model.name, model.library, sorted(set(sizes)), training, threads)
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(order))],
        env=os.environ | ALWAYS_RETURN,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode != 0:
        return {}
    return {int(size): peak for size, peak in json.loads(done.stdout.splitlines()[-1]).items()}


def main(order: str) -> None:
    """Measure an order, given as JSON, and print size -> bytes as one line of JSON."""
    given = Order(**json.loads(order))
    torch.set_num_threads(given.threads)
    model = Model(given.name, "timm" if given.library == "timm" else "vislm")
    peaks = {
        size: resident_peak(model_call(model.build(size), (1, 3, size, size), given.training)) for size in given.sizes
    }
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1])
