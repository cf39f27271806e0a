"""FlowCut's equations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
import models

from vislm import FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.interventions import TowerView
from vislm.token_pruning.flowcut import Flow, entropy_ratio, importance, prune_count

SCHEDULES = {
    (64, 0.95): "565 553 541 529 516 502 487 470 450 423 64",
    (64, 0.85): "544 513 482 451 420 389 357 324 288 244 64",
    (64, 0.70): "518 463 412 365 321 280 241 204 168 130 64",
    (128, 0.85): "548 521 494 467 440 413 385 356 324 286 128",
    (192, 0.85): "552 528 505 482 459 436 412 387 360 327 192",
}


@pytest.mark.parametrize(("target", "ratio"), SCHEDULES)
def test_schedule_of_clip_large_at_constant_entropy(target, ratio) -> None:
    """The published counts after layers 1, 3, ..., 21 of CLIP-L/14-336."""
    alive, counts = 576.0, []
    for layer in range(1, 22, 2):
        remaining = 21 - layer
        if remaining:
            dropped = prune_count(torch.tensor([ratio]), torch.tensor([alive]), target, remaining).round().item()
            alive = max(alive - dropped, target)
        else:
            alive = target
        counts.append(int(alive))
    assert " ".join(map(str, counts)) == SCHEDULES[target, ratio]


def test_entropy_ratio_is_one_for_uniform_and_zero_for_a_single_patch() -> None:
    a = torch.stack([torch.full((16,), 0.3), torch.nn.functional.one_hot(torch.tensor(5), 16).float()])
    torch.testing.assert_close(entropy_ratio(a), torch.tensor([1.0, 0.0]))


def test_entropy_survives_underflow_to_zero() -> None:
    a = torch.tensor([[0.0, 0.0, 1e-30, 0.5]])
    assert torch.isfinite(entropy_ratio(a)).all()


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, s, v = torch.rand(1, 9, generator=generator), torch.rand(1, 9, generator=generator), torch.rand(1, 9, 4)
    pad = lambda x: torch.nn.functional.pad(x, (0, 3))  # noqa: E731
    values = torch.nn.functional.pad(v, (0, 0, 0, 3), value=7.0)
    valid = torch.arange(12)[None] < 9
    torch.testing.assert_close(importance(Flow(pad(a), pad(s), values))[:, :9], importance(Flow(a, s, v)))
    torch.testing.assert_close(entropy_ratio(pad(a), valid), entropy_ratio(a))


def test_images_of_a_batch_prune_at_their_own_pace_unless_the_count_is_shared() -> None:
    """The entropy of one image must not decide how many patches another one loses."""
    model = models.llava()
    pixels = torch.cat([models.pixels(1, 0), models.pixels(1, 1) * 0.01])
    counts = {}
    for shared in (False, True):
        with torch.no_grad(), attach(model, FlowCut(keep=3, shared_count=shared)) as session:
            model.model.vision_tower(pixels, output_hidden_states=True)
            counts[shared] = session.tower_state
    assert counts[False].index.shape == counts[True].index.shape == (2, 3)
    for row in range(2):
        with torch.no_grad(), attach(model, FlowCut(keep=3)) as session:
            model.model.vision_tower(pixels[row : row + 1], output_hidden_states=True)
            assert torch.equal(session.tower_state.index[0], counts[False].index[row])


def test_whole_cells_stay_together() -> None:
    method = FlowCut(keep=8)
    flow = Flow(torch.rand(1, 32, generator=torch.Generator().manual_seed(1)), None, torch.rand(1, 32, 4))
    stage = method.tower_stages(last=2, target=8, signal=lambda call: flow, cell=4)[-1]
    keep = stage.select(TowerView(flow, 1, None, 32, {}))
    assert keep is not None
    assert keep.sum() == 8
    assert (keep.unflatten(1, (-1, 4)).float().mean(-1) % 1 == 0).all()


@pytest.mark.parametrize("options", [{"period": 0}, {"history": 1.0}, {"history": -0.1}, {"tower_keep": 0}])
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), FlowCut(keep=4, **options)):
        pass


def test_a_language_stage_behind_the_last_layer_is_refused() -> None:
    with (
        pytest.raises(PlanConflict, match="layer=4"),
        attach(models.llava(), FlowCut(keep=4, where="language", layer=4)),
    ):
        pass
