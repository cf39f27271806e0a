"""What every method that edits attention has to do, whatever its equations."""

from __future__ import annotations

from dataclasses import dataclass

import models
import pytest
import torch
from running import generate, one_image
from torch.utils._python_dispatch import TorchDispatchMode

from vislm import FlowCut, attach
from vislm.errors import PlanConflict
from vislm.heads.ad_hh import ADHH
from vislm.heads.air import AIR
from vislm.heads.ilvad import ILVAD
from vislm.heads.pai import PAI
from vislm.heads.spin import SPIN
from vislm.heads.vaf import VAF
from vislm.heads.zerotuning import ZeroTuning
from vislm.lmm.decoder import edits
from vislm.lmm.interventions import EditStage
from vislm.token_pruning.divprune import DivPrune

HEADS = ((1, 2), (3, 0), (3, 3))
METHODS = {
    "pai": PAI(alpha=0.5, gamma=1.0),
    "vaf": VAF(enh_para=1.5, sup_para=0.7),
    "spin": SPIN(keep_ratio=0.5),
    "ad_hh": ADHH(heads=HEADS, threshold=0.05),
    "air": AIR(heads=HEADS, threshold=0.05),
    "air, as released": AIR(heads=HEADS, threshold=0.05, project_prefill=True, rescale_logits=True),
    "ilvad": ILVAD(draft_tokens=4, activation=1.5),
    "zerotuning": ZeroTuning(factors=((0, 1, 3.0), (2, 0, 0.3), (2, 3, 2.0))),
}
NEUTRAL = {
    "pai": PAI(alpha=0.0, gamma=1.0),
    "vaf": VAF(enh_para=1.0, sup_para=1.0),
    "spin, all kept": SPIN(keep_ratio=1.0),
    "spin, nothing suppressed": SPIN(suppressed_scale=1.0),
    "ad_hh, no heads": ADHH(heads=()),
    "ad_hh, threshold": ADHH(heads=HEADS, threshold=1.5),
    "air": AIR(heads=(), enhance=1.0, suppress=1.0, lift=0.0, beta=0.0),
    "ilvad": ILVAD(alpha=0.0, beta=1.0),
    "zerotuning, no heads": ZeroTuning(factors=()),
    "zerotuning, ones": ZeroTuning(heads=HEADS, gamma=1.0),
}
methods = pytest.mark.parametrize("name", METHODS)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_have_no_stages_and_are_bit_identical(name: str) -> None:
    model, inputs = models.llava(), one_image("llava")
    untouched, _, _ = generate(model, inputs)
    with attach(model, NEUTRAL[name]) as session:
        assert not session.plan.watches_language
    assert torch.equal(untouched, generate(model, inputs, NEUTRAL[name])[0])


@methods
@pytest.mark.parametrize("pruner", [None, FlowCut(keep=6), DivPrune(keep=6)], ids=["alone", "flowcut", "divprune"])
def test_a_batch_gives_what_its_samples_give_alone(name: str, pruner) -> None:
    """Left padding; one image, two images, and a sample without any, which only zerotuning touches."""
    model, chosen = models.llava(), [m for m in (pruner, METHODS[name]) if m]
    prompts = [models.prompt(7, 8), models.prompt(9, images=2), torch.tensor([[1, 5, 6, 7, 8, 9, 10]])]
    images = [models.pixels(1, 0), models.pixels(2, 1), None]
    pixels = torch.cat([image for image in images if image is not None])
    together, _, _ = generate(model, {**models.left_pad(*prompts), "pixel_values": pixels}, *chosen)
    without, _, _ = generate(model, {"input_ids": prompts[2]})
    for i, (ids, image) in enumerate(zip(prompts, images, strict=True)):
        alone = {"input_ids": ids, **({} if image is None else {"pixel_values": image})}
        logits, _, _ = generate(model, alone, *chosen)
        torch.testing.assert_close(together[:, i], logits[:, 0], atol=2e-4, rtol=1e-4)
    assert torch.allclose(together[:, 2], without[:, 0], atol=2e-4) == (name != "zerotuning")


@methods
def test_static_caches_give_what_dynamic_ones_do(name: str) -> None:
    model = models.llava()
    batch = {**models.left_pad(models.prompt(7, 8), models.prompt(9, 3, 4, 5)), "pixel_values": models.pixels(2)}
    dynamic, _, _ = generate(model, batch, METHODS[name])
    static, _, _ = generate(model, batch, METHODS[name], cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)


@methods
def test_half_precision_stays_finite(name: str) -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    logits, _, _ = generate(model, inputs, METHODS[name], do_sample=True)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ilvad"])
def test_beams(name: str) -> None:
    model, inputs = models.llava(), one_image("llava")
    one, _, _ = generate(model, inputs, METHODS[name], num_beams=3, max_new_tokens=1)
    alone, _, _ = generate(model, inputs, METHODS[name], max_new_tokens=1)
    torch.testing.assert_close(one[0], alone[0].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert generate(model, inputs, METHODS[name], num_beams=3)[1].sequences.shape[0] == 1


@methods
def test_explicit_rows_come_in_pieces_and_no_square_is_held(name: str, monkeypatch) -> None:
    model, inputs = models.llava(), one_image("llava", words=tuple(7 + i % 40 for i in range(400)))
    whole, _, _ = generate(model, inputs, METHODS[name], max_new_tokens=3)
    monkeypatch.setattr(edits, "PIECE", 2**14)
    with Largest() as largest:
        piecewise, _, _ = generate(model, inputs, METHODS[name], max_new_tokens=3)
    assert largest.numel < inputs["input_ids"].shape[1] ** 2 / 4
    torch.testing.assert_close(piecewise, whole, atol=2e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_two_methods_on_one_row_are_refused_by_name() -> None:
    with pytest.raises(PlanConflict, match="pai and spin both edit the attention of decoder layers"):
        with attach(models.llava(), METHODS["pai"], METHODS["spin"]):
            pass
    with attach(models.llava(), PAI(gamma=1.0, layers=(0, 1)), SPIN(layers=(2, 3))):
        pass


@dataclass(frozen=True)
class Same:
    """Replaces every row by what it was."""

    name: str = "same"

    def plan(self, adapter) -> list[EditStage]:
        return [EditStage(frozenset(range(5)), lambda view: view.softmax(), "all")]


def test_edited_rows_keep_the_biases_of_other_methods() -> None:
    model, inputs, pruner = models.llava(), one_image("llava"), DivPrune(keep=6, calibrate=True)
    calibrated, _, _ = generate(model, inputs, pruner)
    edited, _, _ = generate(model, inputs, pruner, Same())
    uncalibrated, _, _ = generate(model, inputs, DivPrune(keep=6))
    torch.testing.assert_close(edited, calibrated, atol=3e-5, rtol=1e-5)
    assert (calibrated - uncalibrated).abs().max() > 1e-3
