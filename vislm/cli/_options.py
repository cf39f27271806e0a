"""Options that several commands share, and turning them into objects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vislm.lmm.interventions import Intervention
    from vislm.lmm.model import LMM

Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME|PATH|HUB", help="vislm-tiny, a local folder, or a hub name.")
]
Prune = Annotated[
    list[str] | None,
    typer.Option("--prune", "-p", metavar="METHOD[:OPTION=VALUE,...]", help="e.g. flowcut:keep=16. May be repeated."),
]
Heads = Annotated[
    list[str] | None,
    typer.Option("--heads", metavar="METHOD[:OPTION=VALUE,...]", help="e.g. vhr:alpha=2. May be repeated."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ...")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Upper limit of an answer.")]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")]


def interventions(prune: list[str] | None, heads: list[str] | None) -> list[Intervention]:
    """Build the methods named on the command line."""
    from vislm import registry

    return [registry.build("pruning", s) for s in prune or ()] + [registry.build("heads", s) for s in heads or ()]


def load(model: str, dtype: str | None, device: str) -> LMM:
    """Load the model named on the command line."""
    from vislm.lmm.model import load_lmm

    return load_lmm(model, dtype=dtype, device=device)
