"""VAR's rules, its options, and the session against explicit matrices."""

from __future__ import annotations

import models
import pytest
import torch
from eager import Prompt, check_against_eager, eager_logits, plain
from hypothesis import given
from hypothesis import strategies as st
from running import generate, mixed_batch, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.heads.var import (
    VAR,
    group_masses,
    image_centric,
    redistribute,
    sink_activation,
    sink_groups,
    sink_tokens,
)
from vislm.lmm.artefacts import write_artefact

OPTIONS = {"dims": (3, 7, 20), "tau": 1.6, "summ": 0.05, "rho": 0.6}


def test_a_massive_activation_makes_a_sink() -> None:
    hidden = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(0))
    hidden[1, 3, 17] = -400.0
    assert sink_tokens(hidden, (300, 17), 20.0).nonzero().tolist() == [[1, 3]]
    assert not sink_tokens(hidden, (300,), 20.0).any()
    assert sink_activation(hidden.half() * 100, (17,)).isfinite().all()


@given(seed=st.integers(0, 999), kept=st.floats(0.0, 1.0))
def test_row_sums_stay(seed: int, kept: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 4, 9, generator=generator).softmax(-1)
    image, sinks = (torch.rand(2, 9, generator=generator) < 0.5 for _ in range(2))
    rows = torch.rand(2, 3, 4, generator=generator) < 0.7
    groups = sink_groups(image, sinks)
    new = redistribute(weights, group_masses(weights, groups), groups, rows, kept)
    torch.testing.assert_close(new.sum(-1), weights.sum(-1))
    assert torch.equal(new[~rows], weights[~rows])
    text = ~image & ~sinks
    torch.testing.assert_close(new.mT[text.unsqueeze(1).expand(2, 3, 9)], weights.mT[text.unsqueeze(1).expand(2, 3, 9)])


def test_rows_without_attention_on_other_image_tokens_are_skipped() -> None:
    weights = torch.tensor([[[[0.4, 0.6, 0.0, 0.0]]]])
    image, sinks = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    groups = sink_groups(image, sinks)
    masses = group_masses(weights, groups)
    assert torch.equal(redistribute(weights, masses, groups, torch.ones(1, 1, 1, dtype=torch.bool), 0.2), weights)


def test_samples_are_judged_by_their_own_sinks() -> None:
    weights = torch.full((2, 1, 1, 4), 0.25)
    image = torch.tensor([[False, True, True, True]] * 2)
    sinks = torch.tensor([[True, False, False, False], [True, True, False, False]])
    groups = sink_groups(image, sinks)
    masses = group_masses(weights, groups)
    assert image_centric(masses, groups, 0.5, 0.2).flatten().tolist() == [False, True]
    assert not image_centric(masses, groups, 0.5, 0.8).any()
    assert not image_centric(masses, groups, 0.3, 0.2).any()


def reference(model, kept: float, largest_share: float, last: bool):
    """VAR by explicit loops over whole matrices; hidden states are those that enter the layer."""
    entering: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=number: entering.__setitem__(
                n, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )

    def edit(logits, mask, layer):
        weights = plain(logits, mask, layer)
        if layer < 2 or (layer == 4 and not last):
            return weights
        x = entering[layer][0, : Prompt.length]
        n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sinks = (n[:, list(OPTIONS["dims"])].abs().amax(-1) > OPTIONS["tau"]).nonzero().flatten().tolist()
        image = list(range(Prompt.start, Prompt.end))
        visual = [k for k in sinks if k in image]
        others = [k for k in image if k not in sinks]
        for head in range(weights.shape[1]):
            for row in range(Prompt.end, weights.shape[2]):
                a = weights[0, head, row].clone()
                share = a[visual].sum() / (a[image] + 1e-6).sum()
                if not visual or share > largest_share or a[image].sum() < OPTIONS["summ"]:
                    continue
                new = a.clone()
                new[sinks] *= kept
                new[others] += (1 - kept) * a[sinks].sum() * a[others] / a[others].sum()
                weights[0, head, row] = new
        return weights

    return edit


@pytest.mark.parametrize(
    ("options", "kept", "share", "last"),
    [
        ({"p": 0.3}, 0.3, 0.6, False),
        ({"p": 0.3, "p_reading": "paper_moves", "except_last_layer": False}, 0.7, 0.6, True),
        ({"p": 0.0, "rho_reading": "paper_other_ratio"}, 0.0, 0.4, False),
    ],
)
def test_session_equals_explicit_matrices(options, kept, share, last) -> None:
    model = models.llava()
    check_against_eager(VAR(**{**OPTIONS, **options}), reference(model, kept, share, last), model=model)


def test_an_artefact_names_the_dimensions(tmp_path) -> None:
    model, inputs = models.llava(), one_image("llava")
    write_artefact(tmp_path / "sinks.json", "sink_dims", "var", model, OPTIONS["dims"])
    by_file = VAR(**{**OPTIONS, "dims": str(tmp_path / "sinks.json")})
    assert torch.equal(generate(model, inputs, by_file)[0], generate(model, inputs, VAR(**OPTIONS))[0])
    with pytest.raises(UsageError, match="fingerprint"), attach(models.llava(seed=1), by_file):
        pass


@pytest.mark.parametrize(
    "options", [{"p": 1.0}, {"p": 0.0, "p_reading": "paper_moves"}, {"layers": ()}, {"layers": (4,)}]
)
def test_neutral_settings_return_no_stages(options) -> None:
    model, inputs = models.llava(), one_image("llava")
    method = VAR(**{**OPTIONS, **options})
    with attach(model, method) as session:
        assert not session.plan.edits
    assert torch.equal(generate(model, inputs)[0], generate(model, inputs, method)[0])


@pytest.mark.parametrize("pruner", [None, FlowCut(keep=9), FastV(keep=8, layer=3)])
def test_a_batch_gives_what_its_samples_give_alone(pruner) -> None:
    model, (batch, singles) = models.llava(), mixed_batch()
    methods = [m for m in (pruner, VAR(**OPTIONS)) if m]
    together, _, _ = generate(model, batch, *methods)
    without, _, _ = generate(model, batch, *methods[:-1])
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, *methods)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)
    assert torch.equal(together[:, 2], without[:, 2])  # no image
    assert (together[:, :2] - without[:, :2]).abs().max() > 1e-3


def test_beams_and_static_caches() -> None:
    model, inputs, method = models.llava(), one_image("llava"), VAR(**OPTIONS)
    dynamic, _, _ = generate(model, inputs, method)
    static, _, _ = generate(model, inputs, method, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)
    beams, _, _ = generate(model, inputs, method, num_beams=3, max_new_tokens=1)
    torch.testing.assert_close(beams[0], dynamic[0].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert generate(model, inputs, method, num_beams=3)[1].sequences.shape[0] == 1


def test_half_precision() -> None:
    model = models.llava(dtype=torch.bfloat16)
    logits, _, _ = generate(model, one_image("llava", dtype=torch.bfloat16), VAR(**OPTIONS))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p=1.5"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"summ": float("nan")}, "summ=nan"),
        ({"tau": 20.0}, "never exceeds sqrt"),
        ({"dims": (40,)}, "lies outside the model"),
        ({"dims": None}, "calibrate-heads"),
    ],
)
def test_impossible_options(options, message) -> None:
    with pytest.raises(UsageError, match=message), attach(models.llava(), VAR(**{**OPTIONS, **options})):
        pass
    with pytest.raises(PlanConflict, match="edits attention"), attach(models.llava(), VAR(**OPTIONS, layers=(2, 9))):
        pass


def test_the_reference_without_edits_is_the_model() -> None:
    model, inputs = models.llava(), one_image("llava")
    logits, out, _ = generate(model, inputs)
    expected = eager_logits(model, inputs, out.sequences[:, : Prompt.length], plain)
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)
