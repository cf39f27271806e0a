"""One command: search, note every finding, write the artefact."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vislm.calibration.journal import open_journal
from vislm.calibration.samples import Sample
from vislm.calibration.searches import Search, attribute, key, search_act, search_zerotuning
from vislm.calibration.settings import Settings
from vislm.calibration.sinks import find_dims, mean_activations
from vislm.eval.captions.vocabulary import Vocabulary
from vislm.lmm.artefacts import write_artefact
from vislm.lmm.model import LMM


def calibrate_heads(
    lmm: LMM,
    samples: Sequence[Sample],
    settings: Settings,
    out: Path,
    vocabulary: Vocabulary,
    *,
    progress: bool = False,
) -> list[Any]:
    """Search and write an artefact; return its entries.

    Every finding is a line of a journal beside ``out``; a search that was killed goes on from there.

    Args:
        lmm: the model.
        samples: with answers (act, zerotuning), with objects (ad_hh).
        settings: what is searched and how.
        out: JSON file; see ``vislm.lmm.artefacts``.
        vocabulary: which words name which object (ad_hh).
        progress: show a bar on a terminal.

    Raises:
        UsageError: settings or samples that cannot be; nothing was found where an empty list makes no sense.
        RunFolderError: the journal belongs to another search or another process.
    """
    settings.check()
    settings.chosen_layers(len(lmm.adapter.layers))
    notes = {"samples": len(samples), "settings": settings.fingerprint(), "vislm": version("vislm")}
    if settings.what == "sinks":
        with open_journal(journal_path(out), fingerprint(lmm, samples, settings)) as journal:
            means = mean_activations(lmm, samples, journal)
        dims = find_dims(means, settings.tau)
        shown = {str(dim): round(means[dim].item(), 3) for dim in means.topk(min(10, len(means))).indices.tolist()}
        write_artefact(out, "sink_dims", "var", lmm.model, dims, largest_means=shown, **notes)
        return dims
    with open_journal(journal_path(out), fingerprint(lmm, samples, settings)) as journal:
        search = Search(lmm, samples, settings, journal, lambda count: None)
        done = sum(key(pair) in journal.found for pair in search.heads)
        with _bar(len(search.heads), done, settings.what, progress) as tick:
            search = Search(lmm, samples, settings, journal, tick)
            if settings.what == "zerotuning":
                entries: list[Any] = search_zerotuning(search)
            elif settings.what == "act":
                entries = search_act(search)
            else:
                entries = attribute(search, vocabulary)
        notes["findings"] = {name: value for name, value in journal.found.items() if not name.startswith("caption")}
    kind = "factors" if settings.what == "zerotuning" else "heads"
    write_artefact(out, kind, settings.what, lmm.model, entries, **notes)
    return entries


def journal_path(out: Path) -> Path:
    """Return where the findings of an artefact are noted."""
    return out.with_name(f"{out.name}.journal")


def fingerprint(lmm: LMM, samples: Sequence[Sample], settings: Settings) -> dict[str, Any]:
    """Return what determines the findings: model, samples, settings."""
    digest = hashlib.sha256("\n".join(sample.digest for sample in samples).encode()).hexdigest()
    own = {**settings.fingerprint(), "samples": digest, "number of samples": len(samples)}
    return {**lmm.fingerprint(), **own, "vislm": version("vislm")}


@contextlib.contextmanager
def _bar(total: int, done: int, name: str, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over the heads on a terminal; silence elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal), transient=True) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
