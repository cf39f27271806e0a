"""Tokens and sentences against recorded outputs of NLTK 3.10 (Punkt English), and properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.eval.captions.sentences import ABBREVIATIONS, split_sentences
from vislm.eval.captions.tokenize import tokenize

CASES = json.loads((Path(__file__).parent / "tokenizer_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("text", "tokens"), CASES)
def test_tokens_equal_nltk(text, tokens) -> None:
    assert tokenize(text) == tokens


def test_full_stops_are_split_off_at_ends_of_sentences_only() -> None:
    assert tokenize("mr. smith sees e.g. a dog. it barks.") == (
        ["mr.", "smith", "sees", "e.g", ".", "a", "dog", ".", "it", "barks", "."]
    )


@pytest.mark.parametrize("word", sorted(ABBREVIATIONS))
def test_abbreviations_end_no_sentence(word) -> None:
    assert split_sentences(f"it is {word}. here") == [f"it is {word}. here"]
    assert len(split_sentences(f"it is q{word}q. here")) == 2


def test_numbers_and_initials_end_a_sentence_only_before_capitals_or_signs() -> None:
    assert len(split_sentences("there are 5. they run")) == 1
    assert len(split_sentences("there are 5. (they run)")) == 2
    assert len(split_sentences("plan b. administrators run")) == 2


def test_closing_quotes_and_brackets_stay_with_their_sentence() -> None:
    assert split_sentences('he said "go." then left. (so.) fine') == ['he said "go."', "then left.", "(so.)", "fine"]


@given(st.text(alphabet="ab.!?\"'()[]-,:;5 \n`$", max_size=40))
def test_no_letter_or_digit_is_lost(text) -> None:
    kept = "".join(token for token in tokenize(text))
    assert [c for c in kept if c.isalnum()] == [c for c in text if c.isalnum()]
    assert not any(c.isspace() for c in kept)


@given(st.text(max_size=60))
def test_sentences_are_parts_of_the_text_in_order(text) -> None:
    position = 0
    for sentence in split_sentences(text.lower()):
        position = text.lower().index(sentence, position) + len(sentence)
