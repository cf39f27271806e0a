"""CDPruner: the greedy MAP against determinants, relevance, and CLIP's text encoder in the session."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import generate, one_image

from vislm import attach
from vislm.errors import CheckpointError, UsageError
from vislm.lmm.choosing import clip_text
from vislm.token_pruning import cdpruner
from vislm.token_pruning.cdpruner import CDPruner, conditional_kernel, greedy_map, relevance, to_unit_range


@given(n=st.integers(3, 9), count=st.integers(1, 4), seed=st.integers(0, 999))
def test_each_choice_enlarges_the_determinant_most(n: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, weight = torch.randn(n, 8, generator=generator), torch.rand(n, generator=generator) + 0.1
    kernel = conditional_kernel(tokens, weight).double()
    count = min(count, n)
    chosen: list[int] = []
    for _ in range(count):
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]))))
    assert greedy_map(kernel, count).tolist() == chosen


def test_the_greedy_subset_is_good_among_all_subsets() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = conditional_kernel(torch.randn(8, 6, generator=generator), torch.ones(8)).double()
    best = max(float(torch.linalg.det(kernel[list(s)][:, list(s)])) for s in itertools.combinations(range(8), 3))
    greedy = greedy_map(kernel, 3)
    assert float(torch.linalg.det(kernel[greedy][:, greedy])) > 0.5 * best


def test_relevance_has_the_official_sign_and_range() -> None:
    text = torch.tensor([[1.0, 0.0]])
    patches = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    r = relevance(patches, text)
    torch.testing.assert_close(r[0], torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(to_unit_range(r)[0], torch.tensor([0.0, 0.5, 1.0]), atol=1e-6, rtol=0)
    assert to_unit_range(r)[1].tolist() == [1.0] * 3
    assert to_unit_range(r, shared=True)[1].tolist() == pytest.approx([(1 - 0.5**0.5) / 2] * 3, abs=1e-5)


class Tokenizer:
    """Whitespace words; enough for the interface that is used."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3 + len(word) for word in text.split()]}


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> clip_text.ClipSpace:
    """A small random CLIP model with the tiny tower's width, in the place of a checkpoint."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "vocab_size": 40, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2},
        projection_dim=16,
    )
    space = clip_text.ClipSpace(CLIPModel(config).eval(), Tokenizer())
    monkeypatch.setattr(cdpruner, "load_clip", lambda name: {"clip": space}[name])
    return space


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_relevance_by_clip_follows_the_question(family: str, clip: clip_text.ClipSpace) -> None:
    from running import FAMILIES

    model, inputs = FAMILIES[family](), one_image(family)
    kept = []
    with attach(model, CDPruner(keep=5, clip="clip")) as session:
        for question in ("is there a dog", "what colour"):
            session.questions = [question]
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert session.last_run is not None
            kept.append(session.last_run.stages[-1].index[0])
    assert len(kept[0]) == len(kept[1]) == 5
    assert kept[0] != kept[1]


def test_a_long_question_is_cut_into_segments(clip: clip_text.ClipSpace) -> None:
    assert clip.text("a b c").shape == (1, 16)
    assert clip.text("word " * 160).shape == (3, 16)
    assert clip.text("").shape == (1, 16)


def test_what_is_missing_is_said(clip: clip_text.ClipSpace, tmp_path) -> None:
    model, inputs = models.llava(), one_image("llava")
    with pytest.raises(UsageError, match="give clip="), attach(model, CDPruner(keep=4)):
        pass
    with pytest.raises(UsageError, match=r"session\.questions"):
        generate(model, inputs, CDPruner(keep=4, clip="clip"))
    with attach(model, CDPruner(keep=4, clip="clip")) as session, pytest.raises(UsageError, match="2 questions"):
        session.questions = ["a", "b"]
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(CheckpointError, match="7 channels"):
        clip.patches(torch.zeros(3, 7))
    with pytest.raises(CheckpointError, match="cannot load the CLIP model"):
        clip_text.load_clip(str(tmp_path))


@pytest.mark.parametrize("source", ["embedding", "none"])
def test_without_clip(source: str) -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, CDPruner(keep=6, relevance=source))  # pyright: ignore[reportArgumentType]
    assert run is not None
    assert run.visual_tokens_kept == [6]


def test_families_without_features_per_patch_are_refused() -> None:
    from vislm.errors import PlanConflict

    adapter = SimpleNamespace(has_token_features=False, family="some")
    with pytest.raises(PlanConflict, match="relevance=embedding"):
        CDPruner(keep=4, clip="clip").plan(adapter)  # pyright: ignore[reportArgumentType]
