"""The singulariser's mistakes are part of CHAIR."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.eval.captions.singularize import PREPOSITIONS, singularize


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("dogs", "dog"),
        ("boxes", "box"),
        ("babies", "baby"),
        ("knives", "knife"),
        ("leaves", "leaf"),
        ("gloves", "glove"),
        ("women", "woman"),
        ("bus", "bu"),
        ("buses", "bus"),
        ("glass", "glas"),
        ("this", "thi"),
        ("is", "is"),  # because "debris" ends with it
        ("police", "polouse"),
        ("four", "fmy"),
        ("cookies", "cookies"),
        ("psychoanalyses", "psychoanalyasis"),
        ("men-of-war", "man-of-war"),
        ("dogs'", "dog's"),
        ("'", "'s"),
        ("", ""),
    ],
)
def test_known_words(word, singular) -> None:
    assert singularize(word) == singular


@given(st.sampled_from(sorted(PREPOSITIONS)), st.sampled_from(["dogs", "men", "buses"]))
def test_the_noun_before_a_preposition_is_inflected(preposition, noun) -> None:
    assert singularize(f"{noun}-{preposition}-x") == f"{singularize(noun)}-{preposition}-x"


@given(st.text(max_size=30))
def test_any_string_has_a_singular(text) -> None:
    assert isinstance(singularize(text), str)


@given(st.text(alphabet="bdfgklmnpr", min_size=2, max_size=8))
def test_regular_plurals_come_back(stem) -> None:
    assert singularize(f"{stem}ads") == f"{stem}ad"
