"""VCD's noise and contrast, and the session against runs on explicitly noised pixels."""

from __future__ import annotations

import math
from pathlib import Path

import families
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import GENERATE, generate, mixed_batch, one_image
from safetensors import safe_open
from safetensors.torch import save_file

from vislm import FlowCut, attach, registry
from vislm.errors import PlanConflict, UsageError
from vislm.golden import verify_folder
from vislm.heads.pai import PAI
from vislm.heads.vcd import VCD, add_noise, contrast, noise_for, signal_share
from vislm.token_pruning.divprune import DivPrune

FOLDER = Path(__file__).parents[1] / "golden" / "vcd"


def test_fixtures_pass() -> None:
    assert {verdict.status for verdict in verify_folder(FOLDER)} == {"pass"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
@pytest.mark.parametrize("change", [0.1, -torch.inf])
def test_any_changed_output_is_noticed(path: Path, change: float, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.startswith("out.")]:
        changed = tensors[name].clone().view(-1)
        changed[changed.isfinite().nonzero()[-1]] += change
        save_file({**tensors, name: changed.view_as(tensors[name])}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
        assert any(one.startswith(name.removeprefix("out.")) for one in failed)


def test_the_schedule_loses_the_signal_step_by_step() -> None:
    shares = [signal_share(step) for step in range(0, 1000, 100)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1.0, abs=1e-4)
    beta = 1.0 / (1.0 + math.exp(6.0)) * (0.005 - 1e-5) + 1e-5
    assert signal_share(0) == pytest.approx(1.0 - beta, abs=1e-7)
    image, noise = torch.full((1000,), 2.0), torch.randn(1000)
    assert add_noise(image, noise, 999).var() == pytest.approx((1 - signal_share(999)) * noise.var().item(), rel=1e-3)


@given(seed=st.integers(0, 50), alpha=st.floats(0.0, 3.0), beta=st.sampled_from([0.0, 0.1, 0.25, 1.0]))
def test_contrast_token_by_token(seed: int, alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(11, generator=generator) * 2 for _ in range(2))
    mixed, probabilities = contrast(logits, other, alpha, beta), logits.double().softmax(-1)
    assert not mixed.isneginf().all()
    for token in range(11):
        share = (probabilities[token] / probabilities.max()).item()
        if abs(share - beta) > 1e-6:
            assert bool(mixed[token].isneginf()) == (share < beta)
        if share > beta:
            expected = (1 + alpha) * logits[token].item() - alpha * other[token].item()
            assert mixed[token].item() == pytest.approx(expected, abs=1e-4)


def test_noise_depends_on_content_and_seed_alone() -> None:
    one, two = torch.randn(2, 3, 8, 8).unbind()
    assert torch.equal(noise_for(one, 0), noise_for(one.clone(), 0))
    assert not torch.equal(noise_for(one, 0), noise_for(one, 1))
    assert not torch.equal(noise_for(one, 0), noise_for(two, 0))
    assert noise_for(one, 0).std() == pytest.approx(1.0, abs=0.2)
    still = torch.randn(6, 3, 1, 4, 4).expand(6, 3, 2, 4, 4)
    noise = noise_for(still, 0)
    assert torch.equal(noise[:, :, 0], noise[:, :, 1])
    moving = noise_for(torch.randn(6, 3, 2, 4, 4), 0)
    assert not torch.equal(moving[:, :, 0], moving[:, :, 1])


def noised(pixels: torch.Tensor, method: VCD) -> torch.Tensor:
    return torch.stack([add_noise(crop, noise_for(crop, method.seed), method.noise_step) for crop in pixels])


@pytest.mark.parametrize("method", [VCD(), VCD(alpha=0.5, beta=0.2, noise_step=900, seed=3)])
def test_greedy_equals_two_explicit_runs(method: VCD) -> None:
    model, inputs = models.llava(), one_image("llava")
    logits, out, run = generate(model, inputs, method, max_new_tokens=8)
    plain, _, _ = generate(model, inputs, max_new_tokens=8)
    other = noised(inputs["pixel_values"], method)
    for step in range(8):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        with torch.no_grad():
            first = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
            second = model(input_ids=ids, pixel_values=other).logits[:, -1]
        expected = contrast(first, second, method.alpha, method.beta)
        assert torch.equal(logits[step].isneginf(), expected.isneginf())
        torch.testing.assert_close(logits[step], expected, atol=1e-4, rtol=1e-5)
        assert out.sequences[0, ids.shape[1]] == expected.argmax()
    assert not torch.equal(logits[0], plain[0])
    assert run.flops["contrast_prefill"] == run.flops["full_tower"] + run.flops["full_prefill"]


def test_no_strength_is_bit_identical() -> None:
    model, (batch, _) = models.llava(), mixed_batch()
    plain, _, _ = generate(model, batch)
    same, _, run = generate(model, batch, VCD(alpha=0.0))
    assert torch.equal(plain, same)
    assert "contrast_prefill" not in run.flops


@pytest.mark.parametrize("pruner", [(), (FlowCut(keep=5, tower_keep=6),), (DivPrune(keep=5),)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_batch_gives_what_its_samples_give(pruner: tuple, options: dict) -> None:
    model, (batch, singles) = models.llava(), mixed_batch()
    _, out, _ = generate(model, batch, *pruner, VCD(), **options)
    for row, single in enumerate(singles):
        _, alone, _ = generate(model, single, *pruner, VCD(), **options)
        assert torch.equal(out.sequences[row, -6:], alone.sequences[0, -6:])


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "idefics3"])
def test_images_of_other_shapes_in_the_batch_do_not_matter(family: str) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture
    prompts = [([picture(0, 0)], [7, 8, 9]), ([picture(1, 1), picture(2, 2)], [7])]
    batch, _, _ = generate(model, families.inputs(family, *prompts), VCD(), max_new_tokens=3)
    for row, prompt in enumerate(prompts):
        alone, _, _ = generate(model, families.inputs(family, prompt), VCD(), max_new_tokens=3)
        assert torch.equal(batch[:, row].isneginf(), alone[:, 0].isneginf())
        torch.testing.assert_close(batch[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)


def test_bfloat16_has_no_nan() -> None:
    logits, _, _ = generate(models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16), VCD())
    assert not logits.isnan().any()
    assert logits.isfinite().any(-1).all()


def test_sampling_is_contrasted_too() -> None:
    model, inputs = models.llava(), one_image("llava")
    call = {**GENERATE, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    with attach(model, VCD()):
        out = model.generate(**inputs, **call)
    greedy, _, _ = generate(model, inputs, VCD())
    assert torch.equal(out.logits[0], greedy[0])


def test_refusals() -> None:
    model = models.llava()
    for options in ({"alpha": -1.0}, {"beta": 2.0}, {"noise_step": 1000}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}="), attach(model, VCD(**options)):
            pass
    with pytest.raises(PlanConflict, match="vcd and pai both run a contrast stream"), attach(model, VCD(), PAI()):
        pass


def test_options_by_name() -> None:
    assert registry.build("heads", "vcd:alpha=0.5,noise_step=300") == VCD(alpha=0.5, noise_step=300)
