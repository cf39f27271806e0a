"""CARVE: regions of a picture, what its recorder sees, and asking again."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from running import generate, one_image
from typer.testing import CliRunner

from vislm import FlowCut, attach, load_lmm
from vislm.cli import carve as command
from vislm.data.scenes import generate_scenes
from vislm.errors import ImageError, PlanConflict, UsageError
from vislm.heads.carve import Carve, Recorder, carve, regions
from vislm.heads.opera import OPERA
from vislm.heads.var import VAR

TINY = {"suffix": "", "general": "describe the image ."}
"""Words that the embedded model knows."""


@pytest.fixture(scope="module")
def lmm():
    return load_lmm("vislm-tiny")


@pytest.fixture(scope="module")
def scene():
    return next(iter(generate_scenes(1, 71)))


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """4-connected regions in scan order, by flooding."""
    left, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, []
    for start in sorted(left):
        if start not in left:
            continue
        region, border = set(), [start]
        while border:
            y, x = border.pop()
            if (y, x) in left:
                left.remove((y, x))
                region.add((y, x))
                border += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        found.append(region)
    return found


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_regions_are_those_of_a_flood(mask: np.ndarray) -> None:
    labels, count = regions.components(mask)
    expected = flooded(mask)
    assert count == len(expected)
    for number, region in enumerate(expected, start=1):
        assert {(int(y), int(x)) for y, x in zip(*np.nonzero(labels == number), strict=True)} == region


def test_steps_count_by_their_number_and_the_shorter_answer_ends_them() -> None:
    question, general = np.full((3, 2, 4), 0.5), np.full((2, 2, 4), 0.25)
    np.testing.assert_allclose(regions.contrast(question, general, 1e-8), 2 * (1 + 2) * 2.0)
    np.testing.assert_allclose(regions.contrast(question[:1], general, 0.25), 2 * 1.0)


def test_enlarging_the_sum_is_the_sum_of_the_enlarged() -> None:
    maps = np.random.default_rng(0).random((6, 20))
    parts = sum(regions.enlarge(values, (4, 5), (37, 23)) for values in maps)
    np.testing.assert_allclose(regions.enlarge(maps.sum(0), (4, 5), (37, 23)), parts, rtol=1e-6)


def test_the_best_regions_stay() -> None:
    fused = np.zeros((8, 8))
    fused[0, 0] = 9.0  # small, highest sum
    fused[2:4, 2:4] = 2.0
    fused[6:8, 5:8] = 1.0  # largest
    share = 11 / 64

    def kept(how, **more) -> set[float]:
        return set(fused[regions.choose_regions(fused, share, how, **more)])

    assert kept("attention_sum", min_keep=1) == {9.0}
    assert kept("size", min_keep=1) == {1.0}
    assert kept("attention_sum", min_keep=2) == {9.0, 2.0}
    assert kept("remove_small", outlier_percent=30.0) == {2.0, 1.0}
    assert kept("remove_small", outlier_percent=90.0) == {1.0}


def test_the_refined_picture_covers_the_original() -> None:
    picture = Image.new("RGB", (60, 40), "white")
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:15, 20:40] = True
    mask[30, 25] = True
    assert regions.bounding_box(mask) == (20, 10, 40, 31)
    refined = regions.refine(picture, mask)
    assert refined.size == (60, 63)
    black = np.asarray(regions.black_out(picture, mask))
    assert ((black > 0).all(-1) == mask).all()


def test_the_recorder_sees_the_last_rows_of_eager_attention_and_changes_nothing() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, out, _ = generate(model, inputs)
    recorder = Recorder(layers=(1, 4))
    watched, _, _ = generate(model, inputs, recorder)
    assert torch.equal(plain, watched)
    maps = recorder.maps(models.PATCHES)
    model.set_attn_implementation("eager")
    for step in range(len(maps)):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        with torch.no_grad():
            attentions = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
        expected = torch.stack([attentions[layer][0, :, -1].mean(0)[3 : 3 + models.PATCHES] for layer in (1, 4)])
        np.testing.assert_allclose(maps[step], expected.numpy(), atol=1e-5)


def test_tokens_that_were_pruned_have_no_attention() -> None:
    model, inputs = models.llava(), one_image("llava")
    recorder = Recorder(layers=(2,))
    _, _, run = generate(model, inputs, FlowCut(keep=6), recorder)
    assert set(np.nonzero(recorder.maps(models.PATCHES)[0, 0])[0].tolist()) == set(run.stages[-1].index[0])


@pytest.mark.parametrize("version", ["v1", "v4"])
def test_one_call_from_question_to_answer(lmm, scene, version) -> None:
    name = next(iter(scene.colours))
    picture = scene.image.resize((120, 90))
    question = f"what color is the {name} ?"
    result = carve(lmm, picture, question, version=version, **TINY)
    assert result.fused.shape == result.mask.shape == (90, 120)
    assert result.steps == 1 if version == "v1" else result.steps > 1
    if version == "v4":
        assert result.first_answer == lmm.ask(picture, question)
    assert result.answer == lmm.ask(result.refined, question)
    assert result.refined.width >= 120
    assert result.refined.height >= 90
    left, top, right, bottom = result.box
    assert result.mask[top:bottom, left:right].sum() == result.mask.sum() > 0
    both = carve(lmm, picture, question, version=version, reask="code_both_images", **TINY)
    assert both.answer == lmm.ask([picture, both.refined], question)


def test_the_layers_of_another_depth(lmm, scene) -> None:
    chosen = carve(lmm, scene.image, "describe the image .", layers=(2,), **TINY)
    default = carve(lmm, scene.image, "describe the image .", **TINY)
    np.testing.assert_array_equal(chosen.fused, default.fused)
    other = carve(lmm, scene.image, "describe the image .", layers=(1, 3), **TINY)
    assert not np.allclose(other.fused, default.fused)


def test_methods_in_force_act_in_all_passes(lmm, scene) -> None:
    with lmm.using(FlowCut(keep=16)):
        result = carve(lmm, scene.image, "describe the image .", **TINY)
        assert result.answer == lmm.ask(result.refined, "describe the image .")
    with lmm.using(VAR(tau=5.0, dims=(3,))):
        assert carve(lmm, scene.image, "describe the image .", **TINY).steps > 0
    with lmm.using(OPERA()), pytest.raises(PlanConflict, match="carve keeps a record of every token, and opera"):
        carve(lmm, scene.image, "describe the image .", **TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v5"}, "v5"),
        ({"top_percent": 0.0}, "top_percent"),
        ({"lam": 0.0}, "lam"),
        ({"min_keep": 0}, "min_keep"),
        ({"layers": (9,)}, "layers 0..3"),
    ],
)
def test_impossible_options(lmm, scene, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        carve(lmm, scene.image, "is there a dog ?", **options)


def test_it_cannot_be_attached() -> None:
    with pytest.raises(PlanConflict, match="vislm carve"), attach(models.llava(), Carve()):
        pass
    with pytest.raises(UsageError, match="num_beams=1"):
        generate(models.llava(), one_image("llava"), Recorder(), num_beams=2)


def test_a_broken_picture(lmm, tmp_path) -> None:
    (tmp_path / "no.png").write_bytes(b"nothing")
    with pytest.raises(ImageError):
        carve(lmm, tmp_path / "no.png", "is there a dog ?")


def test_the_command(scene, tmp_path) -> None:
    scene.image.save(tmp_path / "scene.png")
    app = typer.Typer()
    app.command()(command.carve)
    arguments = [str(tmp_path / "scene.png"), "is there a dog in the image ?", "--options", "version=v3,suffix="]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() in ("yes .", "no .")
    with Image.open(tmp_path / "out" / "refined.png") as refined, Image.open(tmp_path / "out" / "mask.png") as mask:
        assert min(refined.size) >= 64
        assert mask.size == (64, 64)
