"""Fixtures of k-NN classification on frozen features."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vislm.eval.vision.knn_vote import knn_votes
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, difference

TOLERANCE = 2e-5


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare votes and top-1 for every k, the neighbours' weights being those of the largest."""
    options = fixture.kwargs
    try:
        ks, temperature, classes = options["nb_knn"], options["T"], options["num_classes"]
        queries, bank = fixture.inputs["query_features"], fixture.inputs["train_features"]
        labels, right = fixture.inputs["train_labels"], fixture.inputs["query_labels"]
    except KeyError as missing:
        raise Unhandled(f"a fixture of k-NN without {missing}") from missing
    votes = knn_votes(queries, nn.functional.normalize(bank, dim=-1), labels, classes, ks, temperature)
    ours = {f"probas_k{k}": share for k, share in votes.items()}
    ours |= {f"top1_k{k}": (share.argmax(-1) == right).float().mean() for k, share in votes.items()}
    for name, theirs in fixture.outputs.items():
        if name not in ours:
            yield Skipped(name)
        elif name.startswith("top1"):
            yield difference(name, ours[name], theirs, 1e-7)
        else:
            yield difference(name, ours[name], theirs, TOLERANCE)
