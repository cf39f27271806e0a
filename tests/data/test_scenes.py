"""The scene generator: what it draws, how often, and that it always draws the same."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vislm.data.scene_categories import CATEGORIES, THEMES, UNIVERSALS
from vislm.data.scene_types import get_difficulty
from vislm.data.scenes import (
    COLOURS,
    DIFFICULTIES,
    MAX_INSTANCES,
    Scene,
    co_occurrence,
    draw_scene,
    generate_scenes,
)
from vislm.data.shapes import SHAPES, blend, draw_shape
from vislm.errors import UnknownName, UsageError


@pytest.fixture(scope="module")
def biased() -> list[Scene]:
    return list(generate_scenes(4000, 5))


@pytest.fixture(scope="module")
def flat() -> list[Scene]:
    return list(generate_scenes(1000, 5, distribution="flat"))


def test_sizes_of_biased_scenes(biased: list[Scene]) -> None:
    """3.16 categories and 4.40 instances a scene were measured; four standard errors are .08 and .09."""
    assert np.mean([len(s.present) for s in biased]) == pytest.approx(3.16, abs=0.08)
    assert np.mean([len(s.instances) for s in biased]) == pytest.approx(4.40, abs=0.09)
    assert max(len(s.instances) for s in biased) == MAX_INSTANCES


def test_themes_have_their_weights_and_categories_their_popularity(biased: list[Scene]) -> None:
    """Within five standard errors; the extra category and the limit of six objects move a popularity by < .03."""
    seen = Counter(s.theme for s in biased)
    for theme, (weight, members) in THEMES.items():
        assert seen[theme] / len(biased) == pytest.approx(weight, abs=0.04)
        own = [s.counts for s in biased if s.theme == theme]
        for name, popularity in {**members, **UNIVERSALS}.items():
            assert np.mean([name in c for c in own]) == pytest.approx(popularity, abs=0.03 + 2.5 / len(own) ** 0.5)
    strangers = [sum(name not in {**THEMES[s.theme or ""][1], **UNIVERSALS} for name in s.present) for s in biased]
    assert max(strangers) == 1
    assert 0.05 < np.mean(strangers) < 0.11


def test_the_background_does_not_tell_the_theme(biased: list[Scene]) -> None:
    means = {theme: np.mean([s.background for s in biased if s.theme == theme], axis=0) for theme in THEMES}
    for one, other in itertools.combinations(means.values(), 2):
        assert np.abs(one - other).max() < 10  # about four standard errors of a mean


def test_flat_scenes_have_one_to_four_equally_likely_categories(flat: list[Scene]) -> None:
    sizes = Counter(len(s.present) for s in flat)
    assert set(sizes) == {1, 2, 3, 4}
    assert all(n / len(flat) == pytest.approx(0.25, abs=0.06) for n in sizes.values())
    shares = np.array([sum(name in s.counts for s in flat) for name in CATEGORIES]) / len(flat)
    assert shares == pytest.approx(np.full(16, 2.5 / 16), abs=0.06)
    assert {s.theme for s in flat} == {None}


def test_counts_of_a_category(flat: list[Scene]) -> None:
    """One, two or three objects with .60, .26, .14 where the limit of six objects cannot bite."""
    counts = Counter(n for s in flat if len(s.present) <= 2 for n in s.counts.values())
    total = sum(counts.values())
    assert [counts[n] / total for n in (1, 2, 3)] == pytest.approx([0.60, 0.26, 0.14], abs=0.06)


def test_difficulties_give_the_stated_shares_of_faint_and_hidden_objects() -> None:
    for level in DIFFICULTIES.values():
        items = [i for s in generate_scenes(300, 8, difficulty=level) for i in s.instances]
        faint = [i.contrast for i in items if i.contrast < 1]
        assert len(faint) / len(items) == pytest.approx(level.faint, abs=0.06)
        assert np.mean([i.occluded for i in items]) == pytest.approx(level.occluded, abs=0.06)
        low, high = level.faint_contrast
        assert all(low <= c <= high for c in faint)
        assert all(level.min_radius <= i.r <= 8.5 for i in items)


@given(
    st.integers(0, 2**32), st.integers(0, 10_000), st.sampled_from(["biased", "flat"]), st.sampled_from([*DIFFICULTIES])
)
def test_every_scene_keeps_the_rules(seed: int, index: int, distribution, difficulty: str) -> None:
    (scene,) = generate_scenes(1, seed, start=index, distribution=distribution, difficulty=difficulty)
    assert scene.index == index
    assert 1 <= len(scene.instances) <= MAX_INSTANCES
    assert scene.present == [name for name in CATEGORIES if name in scene.counts]
    assert sorted([*scene.present, *scene.absent]) == sorted(CATEGORIES)
    assert all(1 <= n <= 3 for n in scene.counts.values())
    assert all(10 <= channel <= 190 for channel in scene.background)
    cells = {(int(i.x // 16), int(i.y // 16)) for i in scene.instances}
    assert len(cells) == len(scene.instances)
    for item in scene.instances:
        assert item.colour == scene.colours[item.category]
        assert max(abs(a - b) for a, b in zip(item.rgb, COLOURS[item.colour], strict=True)) <= 18
        left, top, width, height = item.bbox
        assert left >= 0
        assert top >= 0
        assert left + width <= 64 + 1e-9
        assert top + height <= 64 + 1e-9


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    whole = list(generate_scenes(6, 11))
    for part in (generate_scenes(3, 11), generate_scenes(2, 11, start=4)):
        for scene in part:
            same = whole[scene.index]
            assert (scene.instances, scene.theme, scene.background) == (same.instances, same.theme, same.background)
            assert scene.image.tobytes() == same.image.tobytes()
    assert next(generate_scenes(1, 12)).image.tobytes() != whole[0].image.tobytes()


def test_the_first_scenes_are_the_ones_of_every_machine() -> None:
    """Annotations of a seed must not change silently: published results name the seed."""
    rows = [
        (
            s.theme,
            s.background,
            [(i.category, i.colour, round(i.x, 3), round(i.y, 3), round(i.r, 3)) for i in s.instances],
        )
        for s in generate_scenes(20, 13579)
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "85a2b67bb8ca1057"


def test_annotations_match_the_drawing() -> None:
    """Every unhidden object is seen inside its box; outside all boxes there is only background and noise."""
    for scene in generate_scenes(60, 21, difficulty="easy"):
        pixels = np.asarray(scene.image).astype(int)
        empty = np.ones((64, 64), dtype=bool)
        for item in scene.instances:
            left, top, width, height = item.bbox
            area = np.s_[max(0, int(top) - 2) : int(top + height) + 3, max(0, int(left) - 2) : int(left + width) + 3]
            empty[area] = False
            near = np.abs(pixels[area] - item.rgb).max(axis=-1) <= 14
            assert near.sum() >= 8, item
        assert np.abs(pixels[empty] - scene.background).max() <= 14


def test_an_occluder_hides_and_a_faint_object_fades() -> None:
    (scene,) = generate_scenes(1, 3, difficulty="easy")
    item = scene.instances[0]
    plain = np.asarray(draw_scene(scene.background, [item], 0, np.random.default_rng(0))).astype(int)

    def visible(**change) -> int:
        changed = type(item)(**{**vars(item), **change})
        drawn = np.asarray(draw_scene(scene.background, [changed], 0, np.random.default_rng(0))).astype(int)
        return int(np.abs(drawn - scene.background).sum())

    everything = int(np.abs(plain - scene.background).sum())
    assert visible(occluder=(item.x, item.y, 2 * item.r)) == 0
    assert 0 < visible(occluder=(item.x + item.r, item.y, item.r / 2)) <= everything
    assert visible(contrast=0.25) == pytest.approx(everything / 4, rel=0.1)


@pytest.mark.parametrize("category", CATEGORIES)
def test_shapes_fill_their_box_and_stay_inside(category: str) -> None:
    background, colour = (100, 100, 100), (240, 215, 50)
    canvas = Image.new("RGB", (200, 200), background)
    draw_shape(ImageDraw.Draw(canvas), category, (100, 100), 60, colour, background)
    ys, xs = np.nonzero((np.asarray(canvas) != background).any(-1))
    assert xs.min() >= 37  # a line has a width
    assert xs.max() <= 163
    assert ys.min() >= 37
    assert ys.max() <= 163
    assert max(np.ptp(xs), np.ptp(ys)) >= 96  # a fish is 2 x 1.2 radii
    assert colour in {value for _, value in canvas.getcolors(40_000) or ()}


def test_shapes_differ() -> None:
    drawn = set()
    for category in SHAPES:
        canvas = Image.new("RGB", (64, 64))
        draw_shape(ImageDraw.Draw(canvas), category, (32, 32), 28, (200, 200, 200), (0, 0, 0))
        drawn.add(canvas.tobytes())
    assert len(drawn) == len(CATEGORIES) == len(SHAPES)


def test_blend_is_linear() -> None:
    assert blend((200, 0, 100), (100, 100, 100), 1.0) == (200, 0, 100)
    assert blend((200, 0, 100), (100, 100, 100), 0.25) == (125, 75, 100)


def test_co_occurrence_counts_scenes(biased: list[Scene]) -> None:
    matrix = co_occurrence(biased)
    assert (matrix == matrix.T).all()
    cup, fork, star = (CATEGORIES.index(name) for name in ("cup", "fork", "star"))
    assert matrix[cup, cup] == sum("cup" in s.counts for s in biased)
    assert matrix[cup, fork] == sum({"cup", "fork"} <= set(s.counts) for s in biased)
    assert matrix[cup, fork] > 10 * matrix[cup, star]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UnknownName, match="'hard2'"):
        get_difficulty("hard3")
    with pytest.raises(UnknownName, match="did you mean 'biased'"):
        generate_scenes(1, 0, distribution="biassed")  # pyright: ignore[reportArgumentType]
    for wrong in ({"n": -1, "seed": 0}, {"n": 1, "seed": -5}, {"n": 1, "seed": 0, "start": -1}):
        with pytest.raises(UsageError, match="expected 0 or more"):
            generate_scenes(**wrong)
    with pytest.raises(UnknownName, match="'dog'"):
        draw_shape(ImageDraw.Draw(Image.new("RGB", (8, 8))), "dogg", (4, 4), 2, (0, 0, 0), (1, 1, 1))
