"""``vislm train-tiny``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_tiny(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder: checkpoints, log, and the model at the end.")],
    seed: Annotated[int, typer.Option("--seed")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Continue a killed run in the folder.")] = True,
) -> None:
    """Train the embedded model vislm-tiny from scratch (about half an hour on two CPU cores)."""
    from vislm.training.tiny.train import train_tiny as train

    train(out, seed=seed, resume=resume, threads=threads)
