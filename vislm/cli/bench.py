"""``vislm bench``."""

from __future__ import annotations

from dataclasses import replace
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


@app.command()
def backbones(
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="NAME,NAME:PEER,...",
            help="Backbones, with a timm model of your choice or the usual one; default: one of each family.",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="PIXELS,...", help="Sides of the images; the two largest give the growth.")
    ] = "224,448,896",
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images at once at 224 pixels, fewer of larger ones; for images/s.")
    ] = 4,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as many as PyTorch takes.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds at most; the fastest counts.")] = 4,
    budget: Annotated[
        float, typer.Option("--budget", min=0, help="Seconds per group of models and size; then no further round.")
    ] = 10.0,
    training: Annotated[bool, typer.Option("--training", help="Forward and backward, not inference.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    blocks: Annotated[bool, typer.Option("--blocks/--no-blocks", help="Compare single blocks with Swin's too.")] = True,
    json: Annotated[Path | None, typer.Option("--json", help="File that takes all figures.")] = None,
) -> None:
    """Time backbones against timm's models of equal size: latency, images per second, peak memory, growth."""
    from vislm.bench.backbones.run import Bench, backbone_lines
    from vislm.cli._sizes import parse_sizes

    wanted = Bench(
        sizes=[parse_sizes("--sizes", size, axes=1)[0] for size in sizes.split(",")],
        batch=batch,
        repeats=repeats,
        budget=budget,
        training=training,
        memory=memory,
        blocks=blocks,
    )
    if models is not None:
        wanted = replace(wanted, models=models.split(","))
    if threads is not None:
        wanted = replace(wanted, threads=threads)
    for line in backbone_lines(wanted, json):
        typer.echo(line)


@app.command()
def pruning(
    tokens: Annotated[int, typer.Option("--tokens", help="Visual tokens: 729 (one crop), or more (tiles).")] = 729,
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAME,...", help="Pruning methods.")
    ] = "divprune,fastv,flowcut,visionzip,pyramiddrop,sparsevlm",
    keeps: Annotated[str, typer.Option("--keep", metavar="RATIO,...", help="Shares of the tokens.")] = "0.5,0.25,0.1",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Timed rounds at most; the least time of each counts.")
    ] = 4,
    budget: Annotated[float, typer.Option("--budget", min=0, help="Seconds; then no further round starts.")] = 360.0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16; auto: the faster one.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as many as PyTorch takes.")] = None,
    tower_layers: Annotated[int | None, typer.Option("--tower-layers", min=1, help="Fewer than the true 26.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=2, help="Decoder layers, fewer than the 24.")] = None,
    field: Annotated[
        bool, typer.Option("--field/--no-field", help="Also run eager attention that returns its maps.")
    ] = True,
    json: Annotated[Path | None, typer.Option("--json", help="File that takes all figures.")] = None,
) -> None:
    """Prune a model of LLaVA-OneVision-0.5B's true shape: share of the saving realised, scoring, cache, memory."""
    from dataclasses import replace

    from vislm.bench.pruning.run import Bench, pruning_lines
    from vislm.errors import UsageError

    try:
        ratios = tuple(float(keep) for keep in keeps.split(","))
    except ValueError as error:
        raise UsageError(f"--keep {keeps!r}: expected ratios joined by commas, such as 0.5,0.25") from error
    wanted = Bench(
        tokens=tokens,
        methods=tuple(methods.split(",")),
        keeps=ratios,
        rounds=rounds,
        budget=budget,
        dtype=dtype,
        device=device,
        tower_layers=tower_layers,
        layers=layers,
        field=field,
    )
    if threads is not None:
        wanted = replace(wanted, threads=threads)
    for line in pruning_lines(wanted, json):
        typer.echo(line)


@app.command()
def heads(
    tokens: Annotated[int, typer.Option("--tokens", help="Visual tokens: 729 (one crop), or more (tiles).")] = 729,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="NAME,...", help="Head methods; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds at most; medians count.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps of every answer.")] = 24,
    budget: Annotated[
        float, typer.Option("--budget", min=0, help="Seconds for each dtype; then no further round starts.")
    ] = 300.0,
    dtypes: Annotated[
        str, typer.Option("--dtypes", metavar="NAME,...", help="Some of float32, bfloat16, float16.")
    ] = "bfloat16,float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: as many as PyTorch takes.")] = None,
    tower_layers: Annotated[int | None, typer.Option("--tower-layers", min=1, help="Fewer than the true 26.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=4, help="Decoder layers, fewer than the 24.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File that takes all figures.")] = None,
) -> None:
    """Edit heads of a model of LLaVA-OneVision-0.5B's true shape: prefill, decode step and peak against untouched."""
    from dataclasses import replace

    from vislm.bench.heads.run import Bench, head_lines

    wanted = Bench(
        tokens=tokens,
        rounds=rounds,
        steps=steps,
        budget=budget,
        dtypes=tuple(dtypes.split(",")),
        device=device,
        tower_layers=tower_layers,
        layers=layers,
    )
    if methods is not None:
        wanted = replace(wanted, methods=tuple(methods.split(",")))
    if threads is not None:
        wanted = replace(wanted, threads=threads)
    for line in head_lines(wanted, json):
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
