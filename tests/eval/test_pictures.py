"""Decoding ahead of the model."""

from __future__ import annotations

import io
import threading
import warnings

import pytest
from PIL import Image

from vislm.errors import ImageError, UsageError
from vislm.eval.protocol import Sample, Stored
from vislm.eval.running import pictures


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    for number in range(10):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"broken")
    return [Sample(f"{n}{k}", (tmp_path / f"{n}.png",), "q") for n in range(10) for k in "ab"]


def red(asked) -> int:
    return asked.images[0].getpixel((0, 0))[0]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_pictures_come_in_order_with_their_samples(samples, workers, size) -> None:
    broken = []
    found = list(pictures.batches(samples, size, workers, "none", lambda s, _: broken.append(s.id)))
    assert [(a.sample.id, red(a)) for batch in found for a in batch] == [
        (s.id, int(s.id[0])) for s in samples if s.id[0] != "4"
    ]
    assert broken == ["4a", "4b"]


def test_neighbours_share_a_decoding(samples, monkeypatch) -> None:
    decoded, original = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda source: decoded.append(source) or original(source))
    assert len(list(pictures.batches(samples, 4, 2, "none", lambda *_: None))) == 5
    assert len(decoded) == 10


def test_no_more_than_two_batches_are_decoded_ahead(samples, monkeypatch) -> None:
    decoded, original = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda source: decoded.append(source) or original(source))
    batches = pictures.batches(samples, 2, 2, "none", lambda *_: None)
    next(batches)
    assert len(decoded) <= 4
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("vislm-pictures")]


def test_stopping_at_a_broken_picture_ends_the_threads(samples) -> None:
    def stop(_, error):
        raise error

    before = list(warnings.filters)
    with pytest.raises(ImageError, match=r"4\.png"):
        list(pictures.batches(samples, 2, 2, "none", stop))
    assert not [t for t in threading.enumerate() if t.name.startswith("vislm-pictures")]
    assert warnings.filters == before


def test_stored_pictures_are_named() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    assert pictures.picture(Stored("row 7", buffer.getvalue()), "grey").getcolors() == [(6, (128, 128, 128))]
    with pytest.raises(ImageError, match="row 7"):
        pictures.picture(Stored("row 7", b"x"))
    with pytest.raises(UsageError, match="workers=-1"):
        next(pictures.batches([], 1, -1, "none", lambda *_: None))
