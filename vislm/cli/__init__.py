"""The command line: ``vislm COMMAND``. Importing it costs no torch; every command loads what it needs."""

from __future__ import annotations

import os
import sys

import typer

from vislm.cli import (
    analyze,
    ask,
    bench,
    calibrate_heads,
    carve,
    compare,
    data,
    demo,
    evaluate,
    explain_prune,
    listing,
    report,
    score,
    suggest_window,
    train,
    tune_pruning,
    verify,
    visualize,
)
from vislm.errors import UsageError, VislmError

# typer brings its own click from some release on; its errors' common base is reached through a public one
CommandLineError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="vislm",
    help="Attention in vision transformers and large multimodal models: prune visual tokens, reweight heads, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ask")(ask.ask)
app.command("eval")(evaluate.evaluate)
app.add_typer(visualize.app, name="visualize")
app.command("list")(listing.list_names)
app.command("info")(listing.info)
app.command("verify")(verify.verify)
app.add_typer(data.app, name="data")
app.command("train-tiny")(train.train_tiny)
app.add_typer(bench.app, name="bench")
app.command("suggest-window")(suggest_window.suggest_window)
app.command("explain-prune")(explain_prune.explain_prune)
app.command("tune-pruning")(tune_pruning.tune_pruning)
app.command("calibrate-heads")(calibrate_heads.calibrate_heads)
app.command("carve")(carve.carve)
app.command("analyze")(analyze.analyze)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("score")(score.score)
app.command("demo")(demo.demo)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if debug:
        os.environ["VISLM_DEBUG"] = "1"


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2, a failure in exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except CommandLineError as error:
        error.show()  # pyright: ignore[reportAttributeAccessIssue]
        sys.exit(2)
    except VislmError as error:
        if os.environ.get("VISLM_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if os.environ.get("VISLM_DEBUG"):
            raise
        typer.echo(f"error: {error.strerror or error}: {error.filename or ''}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
