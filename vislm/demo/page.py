"""The demonstration's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vislm.demo.measure import HELD_OUT, ROUNDS, TIMED_BATCH
from vislm.demo.photograph import RealSizes
from vislm.report.page import Block, Facts, Figure, Section, Table, Text, write_page
from vislm.report.tables import Rows

LEAD = (
    "A multimodal model answers questions about pictures; then the same model, untouched, does so with most of its "
    "visual tokens dropped and some of its heads amplified while it runs. Every figure was measured when this page was "
    "made."
)


def write_demo_page(
    out: Path,
    *,
    dialogue: Rows,
    table: Rows,
    oracle: Mapping[str, float],
    figures: Mapping[str, Path],
    sizes: RealSizes,
    held_out: int,
    facts: Mapping[str, str],
    machine: str,
) -> Path:
    """Write the page and return its path.

    Args:
        out: HTML file.
        dialogue: question, answer, truth and right of the first scene.
        table: one row per setting.
        oracle: context-only oracle on POPE's adversarial split.
        figures: "scenes", "tokens", "curves" and "heads".
        sizes: the photograph's part.
        held_out: scenes behind POPE and CHAIR.
        facts: shown at the top.
        machine: the footer.
    """
    sections = [
        Section(
            "What the model sees and says",
            [
                Facts(facts),
                Figure(
                    figures["scenes"],
                    "Three scenes that the model never saw, and what is in them. Faint and half-hidden objects count.",
                ),
                Table(
                    dialogue,
                    "vislm-tiny about scene 1, with all its 64 visual tokens. A description is right if it names every "
                    "category that is there and no other.",
                ),
            ],
        ),
        Section("Fewer visual tokens, amplified heads", _comparison(table, oracle, figures, held_out)),
        Section("Real sizes", _real_sizes(sizes)),
    ]
    return write_page(out, "vislm: the demonstration", sections, lead=LEAD, footer=machine)


def _comparison(table: Rows, oracle: Mapping[str, float], figures: Mapping[str, Path], held_out: int) -> list[Block]:
    caption = (
        "right: answers to all questions about the three scenes (a caption is right if it names every object and no "
        f"other). POPE (adversarial split) and CHAIR on {held_out} scenes of seed {HELD_OUT}, so few that a difference "
        "of some hundredths is noise; an oracle that sees nothing but which other objects are there gets accuracy "
        f"{oracle['best_accuracy']:.3f} and AUROC {oracle['auroc']:.3f}. yes: share of yes answers. MFLOP (cost model) "
        f"and KV cache: one question. Times: medians of {ROUNDS} batches of {TIMED_BATCH} on one thread, the settings "
        "taking turns. saving realised: share of the saved FLOPs that shows in the time of tower and prefill. VHR runs "
        "the prompt without its image as well, which costs and saves nothing."
    )
    return [
        Table(table, caption, emphasis=[True]),
        Figure(figures["curves"], "How well yes and no are told apart when tokens are dropped; right end: all tokens."),
        Figure(figures["tokens"], "Visual tokens that stay (clear) and go (faded), and the caption that they give."),
        Figure(figures["heads"], "VHR: how much each head's output changes without the image, and the factor it gets."),
    ]


def _real_sizes(sizes: RealSizes) -> list[Block]:
    text = (
        "A photograph through a model of LLaVA-1.5's true tower (CLIP-L/14, 336 pixels, 24 layers) and width (4096, 32 "
        f"heads), with {sizes.layers} decoder layers instead of 32 and untrained weights ({sizes.dtype}). It shows "
        "sizes and speed; which patches stay means nothing here, and there is no answer."
    )
    return [
        Text(text),
        Table(
            sizes.rows, "One picture and 60 text tokens; the fastest of up to 5 runs. FastV drops before layer 1 here."
        ),
        Figure(sizes.figure, "Untrained weights: sizes and speed only. Photograph: NASA, public domain."),
    ]
