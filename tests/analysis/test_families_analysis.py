"""Recorder and knockout on a tiny model of every family."""

from __future__ import annotations

import families
import pytest
import torch
from families import FAMILIES

from vislm import attach
from vislm.analysis import recorder, rows
from vislm.analysis.call_rows import CallRows
from vislm.analysis.groups import GROUPS
from vislm.analysis.knockout import Knockout
from vislm.analysis.recorder import Recorder, recorded
from vislm.errors import UsageError

NEW = 3


def generate(model, inputs, *methods):
    with attach(model, *methods) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return torch.stack(out.logits), session.last_run


def two_prompts(family: str) -> dict[str, torch.Tensor]:
    """Left padding: a longer prompt with one image, a shorter one without any."""
    picture = FAMILIES[family].picture(0, 0)
    return families.inputs(family, ([picture], [7, 8, 9]), ([], [9, 10]))


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_nothing_and_shares_sum_to_one(family) -> None:
    model, inputs = families.build(family), two_prompts(family)
    plain, _ = generate(model, inputs)
    same, run = generate(model, inputs, Recorder("last_rows", columns=True, divergence=True))
    assert torch.equal(plain, same)
    recording = recorded(run)
    assert len(recording.steps) == NEW
    for sample in (0, 1):
        mass = recording.over_steps("mass", sample)
        torch.testing.assert_close(mass.sum(-1), torch.ones(NEW, families.LAYERS, 4))
        assert (mass[..., GROUPS.index("image")].sum() > 0) == (sample == 0)
        assert mass[..., GROUPS.index("pad")].abs().max() == 0
    for layer, record in recording.prefill.items():
        rows_of_sample = record.valid.sum(-1)
        torch.testing.assert_close(record.received.sum(-1), rows_of_sample[:, None].float().expand(-1, 4))
        assert recording.divergence[layer].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_the_image_off_hides_it(family) -> None:
    model, inputs = families.build(family), two_prompts(family)
    plain, _ = generate(model, inputs)
    cut, _ = generate(model, inputs, Knockout(("image>text",)))
    assert not torch.allclose(cut[:, 0], plain[:, 0], atol=1e-4)
    torch.testing.assert_close(cut[:, 1], plain[:, 1], atol=1e-5, rtol=1e-5)  # the prompt without an image
    other = dict(inputs)
    name = next(key for key in inputs if key.startswith("pixel_values"))
    other[name] = -2.0 * inputs[name]  # zero tiles stay zero: they are padding
    again, _ = generate(model, other, Knockout(("image>text",)))
    torch.testing.assert_close(again, cut, atol=1e-5, rtol=1e-5)


def test_rows_come_in_pieces(monkeypatch) -> None:
    model, inputs = families.build("llava"), two_prompts("llava")
    sizes: list[int] = []
    original = CallRows.rows

    def counted(self, index):
        found = original(self, index)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(CallRows, "rows", counted)
    monkeypatch.setattr(rows, "PIECE", 600)
    _, run = generate(model, inputs, Recorder(columns=True))
    batch, heads, tokens = recorded(run).prefill[0].received.shape
    assert max(sizes) <= max(600, batch * heads * tokens)
    assert sum(sizes) == families.LAYERS * batch * heads * tokens**2


def test_the_estimate_of_maps() -> None:
    assert recorder.map_bytes((2, 4, 10, 12), 3) == 4 * 3 * 2 * 4 * 10 * 12
    recorder.check_maps(10, 10, "a")
    with pytest.raises(UsageError, match="full maps of a take"):
        recorder.check_maps(11, 10, "a")
