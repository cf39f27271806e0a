"""Real sizes: a photograph through an untrained model of LLaVA-1.5's true tower and width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vislm import registry
from vislm.demo.timing import interleaved
from vislm.images import load_image
from vislm.lmm.adapters import adapter_for
from vislm.lmm.interventions import Intervention
from vislm.lmm.run import Run
from vislm.lmm.session import attach
from vislm.report.panels import panel_figure
from vislm.report.tables import Cell
from vislm.report.tokens import token_panels
from vislm.report.units import bytes_text, percent_text

PHOTO = Path(__file__).parent.parent / "assets" / "photos" / "astronaut.jpg"
METHODS = {
    "all 576 tokens": None,
    "flowcut, 64": "flowcut:keep=64",
    "fastv, 64": "fastv:keep=64,layer=1",
}
"""Label -> pruning. FastV drops before its usual second layer, as the model has few."""


@dataclass(frozen=True)
class RealSizes:
    """The photograph's table and picture."""

    rows: list[dict[str, Cell]]
    figure: Path
    layers: int
    dtype: str


def measure_photograph(out: Path, layers: int, budget: float = 35.0) -> RealSizes:
    """Time tower and prefill of every method on the photograph, and draw the patches that stay.

    Args:
        out: PNG file to write.
        layers: decoder layers.
        budget: seconds after which no further round of timing starts; at most 5 rounds are timed, the fastest counts.
    """
    from vislm.demo import true_shape

    dtype = true_shape.fast_dtype()
    model, photo = true_shape.build_llava(layers, dtype=dtype), load_image(PHOTO)
    inputs = true_shape.photo_inputs(photo, dtype)

    def call(methods: tuple[Intervention, ...]) -> Run:
        with attach(model, *methods) as session:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
        assert session.last_run is not None
        return session.last_run

    chosen = [(registry.build("pruning", spec),) if spec else () for spec in METHODS.values()]
    with torch.no_grad():
        runs = interleaved([lambda m=methods: call(m) for methods in chosen], 5, budget, min)
    rows = [_row(label, run, runs[0]) for label, run in zip(METHODS, runs, strict=True)]
    adapter = adapter_for(model)
    panels = [
        panel
        for (label, run), row in zip(zip(METHODS, runs, strict=True), rows, strict=True)
        for panel in token_panels(
            photo,
            label,
            f"tower + prefill {row['tower + prefill ms']} ms\nKV cache {row['KV cache']}",
            run,
            adapter,
            processor=_Sees(true_shape.image_processor()),
        )
    ]
    figure = panel_figure([panels], out, side=3.4)
    return RealSizes(rows, figure, layers, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Sees:
    """The part of a processor that says what of a picture the tower sees."""

    image_processor: object


def _row(label: str, run: Run, full: Run) -> dict[str, Cell]:
    tower, prefill = run.seconds["tower"], run.seconds["prefill"]
    return {
        "setting": label,
        "visual tokens": run.visual_tokens_kept[0],
        "tower ms": f"{tower * 1e3:.0f}",
        "prefill ms": f"{prefill * 1e3:.0f}",
        "tower + prefill ms": f"{(tower + prefill) * 1e3:.0f}",
        "TFLOPs": round((run.flops["tower"] + run.flops["prefill"]) / 1e12, 3),
        "KV cache": bytes_text(run.kv_bytes),
        "saving realised": "-" if run is full else percent_text(run.realised_saving(full)),
    }
