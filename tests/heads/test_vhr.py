"""VHR's equations, and the text-only stream against two separate runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
import models
from models import IMAGE_TOKEN

from vislm import VHR, attach
from vislm.errors import UsageError
from vislm.heads.vhr import default_layers, divergence, outliers, select_heads, text_norm


def test_selects_half_of_the_heads_without_ties() -> None:
    vhd = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    assert select_heads(vhd).sum(-1).tolist() == [4] * 5
    assert select_heads(vhd[:, :7]).sum(-1).tolist() == [3] * 5
    assert not select_heads(torch.zeros(2, 6)).any()


def test_outliers_must_surge_in_both_measures() -> None:
    vhd = torch.tensor([[1.0, 1.0, 1.0, 9.0, 1.0, 8.0]])
    activity = torch.tensor([[1.0, 1.0, 1.0, 9.0, 9.0, 1.0]])
    assert outliers(vhd, activity).tolist() == [[False, False, False, True, False, False]]
    selected = select_heads(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[False, False, False, True]]))
    assert selected.tolist() == [[False, True, True, False]]


def test_statistics_are_float32_in_half_precision() -> None:
    a = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
    assert divergence(a, -a).dtype == torch.float32
    assert torch.isfinite(text_norm(a)).all()


def test_published_layers() -> None:
    assert default_layers(32) == {1, *range(18, 32)}
    assert default_layers(4) == {1, 2, 3}
    assert default_layers(1) == {0}


def head_outputs(model, inputs) -> torch.Tensor:
    """Head outputs (L, H, d) at the last position of a plain prefill, read in front of the output projections."""
    seen = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1]))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).unflatten(-1, (model.config.text_config.num_attention_heads, -1))


def test_image_only_divergence_equals_two_separate_prefills() -> None:
    """The first reinforced layer sees no earlier reinforcement: its divergence is that of two plain runs."""
    model = models.llava()
    batch = models.left_pad(models.prompt(7, 8, 9), models.prompt(9, 3, 4, 5, 6))
    pixels = models.pixels(2)
    text = [ids[0][(ids[0] != IMAGE_TOKEN)][None] for ids in (models.prompt(7, 8, 9), models.prompt(9, 3, 4, 5, 6))]
    a = head_outputs(model, {**batch, "pixel_values": pixels})
    u = head_outputs(model, models.left_pad(*text))
    with torch.no_grad(), attach(model, VHR(layers=(2, 4), text_stream="image_only")) as session:
        model(**batch, pixel_values=pixels)
        memory = session.last_run.memory[0]
    torch.testing.assert_close(memory["vhd"][2], divergence(a[2], u[2]), atol=1e-5, rtol=1e-4)
    assert sorted(memory["vhd"]) == [2, 4]


def test_samples_without_image_are_left_alone() -> None:
    model = models.llava()
    batch = models.left_pad(models.prompt(7, 8, 9), torch.tensor([[1, 5, 6, 9]]))
    with torch.no_grad():
        plain = model(**batch, pixel_values=models.pixels()).logits[:, -1]
        with attach(model, VHR()) as session:
            logits = model(**batch, pixel_values=models.pixels()).logits[:, -1]
    factors = session.last_run.head_factors
    assert all((f[1] == 1.0).all() for f in factors.values())
    assert all((f[0] != 1.0).any() for f in factors.values())
    torch.testing.assert_close(logits[1], plain[1], atol=1e-6, rtol=0)
    assert (logits[0] - plain[0]).abs().max() > 1e-3


def test_the_text_stream_stays_out_of_recorded_hidden_states() -> None:
    model = models.llava()
    inputs = {"input_ids": models.prompt(7, 8, 9), "pixel_values": models.pixels()}
    with torch.no_grad(), attach(model, VHR()):
        out = model(**inputs, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [22] * 6


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_impossible_factors(alpha) -> None:
    with pytest.raises(UsageError, match="alpha"), attach(models.llava(), VHR(alpha=alpha)):
        pass
