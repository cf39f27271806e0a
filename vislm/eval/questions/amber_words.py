"""What AMBER's generative part needs from outside this package: nouns of a description, and word vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from vislm.errors import UsageError

Nouns = Callable[[str], Sequence[str]]
Similarity = Callable[[str, str], float]
VECTORS = "en_core_web_lg"
"""The spaCy model of the published figures (560 MB). Smaller ones give other scores."""


def nltk_nouns() -> Nouns:
    """Return the official noun finder: NLTK's tags NN, NNS, NNP, NNPS, lemmatised by WordNet.

    Raises:
        UsageError: NLTK or its data are not installed; nothing is downloaded.
    """
    try:
        nltk: Any = import_module("nltk")
        lemmatizer = import_module("nltk.stem").WordNetLemmatizer()
    except ImportError:
        raise UsageError("AMBER's generative part needs nouns: install nltk, or pass nouns=") from None

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]

    try:
        nouns("A dog.")
    except LookupError:
        needed = "punkt_tab, averaged_perceptron_tagger_eng and wordnet"
        raise UsageError(f"AMBER's generative part needs NLTK's {needed}: install them, or pass nouns=") from None
    return nouns


def spacy_similarity(model: str = VECTORS) -> Similarity:
    """Return the official similarity of two words: cosine of spaCy's vectors.

    Raises:
        UsageError: spaCy or the model is not installed; nothing is downloaded.
    """
    try:
        language = import_module("spacy").load(model)
    except (ImportError, OSError):
        raise UsageError(
            f"AMBER's generative part needs word vectors: install spacy and its model {model}, "
            'pass similarity=, or run the yes/no questions alone with task="discriminative"'
        ) from None
    vector = cache(language)

    @cache
    def similarity(a: str, b: str) -> float:
        return vector(a).similarity(vector(b))

    return similarity
