"""Fixtures of image-text retrieval: embeddings and the recalls that follow from them, exact."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.eval.vision.retrieval_metrics import recalls
from vislm.golden.fixtures import Comparison, Fixture, Unhandled

_NAMES = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
"""The fixture's word for what is found -> ours for the direction."""
_FLOAT32 = 1e-7
"""Recalls are counts over thousands at most, stored in single precision."""


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the recall at every k that the fixture has."""
    inputs = fixture.inputs
    if not {"text_image_index", "image_features", "text_features"} <= inputs.keys():
        raise Unhandled(f"inputs {sorted(inputs)} belong to no known retrieval fixture")
    expected = {name: value.item() for name, value in fixture.outputs.items()}
    ks = sorted({int(name.rpartition("_")[2]) for name in expected})
    ours = recalls(
        inputs["image_features"].numpy(), inputs["text_features"].numpy(), inputs["text_image_index"].tolist(), ks
    )
    for name, value in expected.items():
        kind, _, k = name.partition("_recall_at_")
        yield Comparison(name, abs(ours[f"{_NAMES[kind]}_R@{k}"] - value), _FLOAT32)
