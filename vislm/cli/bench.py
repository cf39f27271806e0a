"""``vislm bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure speed and memory; every figure is a ratio of two things timed in one process.")


@app.callback()
def _bench() -> None:
    """Measure speed and memory."""


@app.command()
def startup(runs: Annotated[int, typer.Option("--runs", min=1, help="Fresh interpreters of each kind.")] = 7) -> None:
    """Time ``vislm --help`` and ``import vislm`` against a bare interpreter."""
    from vislm.bench.startup import startup_lines

    for line in startup_lines(runs):
        typer.echo(line)


@app.command()
def statistics(
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Sequence length.")] = 1024,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 16,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    runs: Annotated[int, typer.Option("--runs", min=1)] = 7,
) -> None:
    """Time attention with statistics against plain SDPA and against the explicit matrix."""
    from vislm.bench.statistics import statistics_lines

    for line in statistics_lines(tokens, heads, head_dim, runs):
        typer.echo(line)


@app.command()
def kernels(
    grids: Annotated[
        str, typer.Option("--grids", metavar="HxW,...", help="Grids of tokens, joined by commas.")
    ] = "28x28,56x56,112x112,224x224",
    window: Annotated[int, typer.Option("--window", min=1, help="Window, and side of a halo block.")] = 7,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 3,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 32,
    patterns: Annotated[
        str, typer.Option("--patterns", help="Some of neighborhood, halo, window, joined by commas.")
    ] = "neighborhood,halo,window",
    peers: Annotated[
        str, typer.Option("--peers", help="Some of sdpa, flex, gather, eager, natten, timm; none = only ours.")
    ] = "sdpa,flex,gather,eager,natten,timm",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Interleaved rounds at most.")] = 15,
    memory_limit: Annotated[
        float, typer.Option("--memory-limit", help="GiB that a peer's N x N or gathered tensors may need.")
    ] = 8.0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for kernels.json and the plots.")] = Path("kernels"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small grids, three rounds: only to see that it runs.")
    ] = False,
) -> None:
    """Time local attention against SDPA, FlexAttention, gathering, NATTEN and timm; peak memory; statistics."""
    from vislm.bench.kernels.run import Bench, kernel_lines
    from vislm.cli._sizes import parse_sizes

    wanted = Bench(
        grids=[parse_sizes("--grids", grid) for grid in grids.split(",")],
        window=window,
        heads=heads,
        head_dim=head_dim,
        runs=runs,
        patterns=patterns.split(","),
        peers=[] if peers == "none" else peers.split(","),
        memory_limit=memory_limit,
        device=device,
        dtype=dtype,
        memory=memory,
    )
    for line in kernel_lines(wanted.quick() if quick else wanted, out):
        typer.echo(line)


@app.command(name="gpu-audit")
def gpu_audit(
    targets: Annotated[
        str, typer.Option("--targets", help="Compute capabilities times ten, joined by commas.")
    ] = "80,90,100",
    match: Annotated[str, typer.Option("--match", help="Only the configurations whose name contains this.")] = "",
    docs: Annotated[Path | None, typer.Option("--docs", help="Markdown file that takes the table.")] = None,
) -> None:
    """Compile every Triton kernel for cards that are not there; fail on spills, misfits, missing tensor cores."""
    from vislm.bench.gpu_audit.audit import audit_rows, audit_table, problems, write

    rows = list(audit_rows([int(target) for target in targets.split(",")], match=match))
    typer.echo(audit_table(rows))
    if docs is not None:
        write(audit_table([row for row in rows if " bf16 D=64" in row.name]), docs)
    if problems(rows):
        typer.echo("\n".join(problems(rows)), err=True)
        raise typer.Exit(1)
