"""Rows that say which visual tokens were left: the same answers, and what the model kept."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from PIL import Image

from vislm.errors import UsageError
from vislm.eval.protocol import Asked, Sample
from vislm.eval.running.kept_tokens import kept_per_picture, seen_share
from vislm.eval.running.subjects import LmmSubject, keep_tokens
from vislm.lmm.model import load_lmm
from vislm.registry import build


@pytest.fixture(scope="module")
def lmm():
    return load_lmm("vislm-tiny")


def asked(count: int) -> list[Asked]:
    pictures = [Image.linear_gradient("L").convert("RGB").rotate(90 * n).resize((96, 96 + n)) for n in range(count)]
    return [Asked(Sample(str(n), (), "Is there a dog in the image?"), (p,)) for n, p in enumerate(pictures)]


@pytest.mark.parametrize(("method", "options"), [("pruning", "flowcut:keep=8"), ("pruning", "random:keep=5")])
def test_rows_hold_what_was_kept_and_the_same_answers(lmm, method, options) -> None:
    with lmm.using(build(method, options)):
        plain = LmmSubject(lmm).respond(asked(3), max_new_tokens=4)
        subject = LmmSubject(lmm)
        keep_tokens(subject)
        found = subject.respond(asked(3), max_new_tokens=4)
        stage = lmm.last_run.stages[-1]
    assert [row["text"] for row in found] == [row["text"] for row in plain]
    assert all("kept" not in row for row in plain)
    for number, row in enumerate(found):
        (kept,) = row["kept"]
        assert kept["index"] == [int(i) for i in stage.index[number]]
        assert len(kept["index"]) == row["visual_tokens_kept"]
        assert kept["of"] == row["visual_tokens"] == kept["grid"][0] * kept["grid"][1]
        assert kept["seen"] == [0.0, 0.0, 1.0, 1.0]


def test_nothing_is_stored_where_nothing_was_dropped(lmm) -> None:
    subject = LmmSubject(lmm)
    keep_tokens(subject)
    assert all("kept" not in row for row in subject.respond(asked(2), max_new_tokens=2))


def test_models_that_split_a_batch_are_asked_one_by_one(lmm) -> None:
    class Splitting:
        def __init__(self) -> None:
            self.batches: list[int] = []

        def fingerprint(self) -> dict:
            return {}

        def ask_many(self, images, questions, **options):
            self.batches.append(len(questions))
            return [lmm.ask_many([i], [q], **options)[0] for i, q in zip(images, questions, strict=True)]

        def __getattr__(self, name):
            return getattr(lmm, name)

    splitting = Splitting()
    subject = LmmSubject(splitting)
    keep_tokens(subject)
    with lmm.using(build("pruning", "flowcut:keep=8")):
        first = subject.respond(asked(3), max_new_tokens=2)
        second = subject.respond(asked(2), max_new_tokens=2)
    assert splitting.batches == [3, 1, 1, 1, 1, 1]
    assert all(len(row["kept"][0]["index"]) == 8 for row in [*first, *second])


def test_only_lmms_have_visual_tokens() -> None:
    class Detector:
        def respond(self, batch, *, max_new_tokens):
            return []

        def fingerprint(self):
            return {}

    with pytest.raises(UsageError, match="--store-kept is for LMMs"):
        keep_tokens(Detector())


def test_a_model_without_a_record() -> None:
    assert kept_per_picture(object(), [(4, 4)]) is None


def test_what_a_processor_shows() -> None:
    class Adapter:
        crops_per_image = 1

    class Processor:
        class image_processor:
            do_center_crop = True
            size = MappingProxyType({"shortest_edge": 336})
            crop_size = MappingProxyType({"width": 336, "height": 336})

    assert seen_share((640, 480), Adapter(), Processor()) == [0.125, 0.0, 0.875, 1.0]
    assert seen_share((480, 640), Adapter(), Processor()) == [0.0, 0.125, 1.0, 0.875]
    assert seen_share((480, 640), Adapter(), None) == [0.0, 0.0, 1.0, 1.0]
