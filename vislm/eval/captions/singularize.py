"""English plural -> singular exactly as CHAIR's reference scorer does it, mistakes included.

The reference scorer singularises *every* token with ``pattern.en.singularize``, so "has" becomes "ha", "bus" becomes
"bu" (and is then no object) and "police" becomes "polouse". The published CHAIR figures contain these mistakes; a
better singulariser would give other figures. The rules here were inferred from that function's outputs.
"""

from __future__ import annotations

from typing import Final

_PREPOSITIONS = (
    "about above across after among around at athwart before behind below beneath beside besides between betwixt "
    "beyond but by during except for from in into near of off on onto out over since till to under until unto upon "
    "with"
)
PREPOSITIONS: Final = frozenset(_PREPOSITIONS.split())
"""Of a hyphenated word whose second part is one of these, the first part is inflected: men-of-war -> man-of-war."""

_UNINFLECTED = (
    "breeches britches chassis christmas clippers contretemps corps debris diabetes gallows georgia graffiti "
    "happiness headquarters herpes high-jinks innings jackanapes mathematics measles mews mumps news pincers pliers "
    "proceedings progress rabies scissors series shears species swiss"
)
# The reference tests the wrong direction ("does a listed word end with this one?"), so every *ending* of a listed
# word stays as it is: "is" because of "debris", "as" because of "christmas".
_UNCHANGED: Final = frozenset(word[start:] for word in _UNINFLECTED.split() for start in range(len(word) + 1))

# "-ie" nouns whose plural the reference returns unchanged.
_IE_PLURALS = (
    "aunties beanies birdies bogies bombies collies cookies cuties doggies eyries freebies goonies groupies hankies "
    "hippies hoagies hotties indies junkies laddies laramies lingeries meanies newbies nighties oldies pixies "
    "quickies reveries rookies softies sorties stoolies sweeties techies toughies valkyries veggies weenies yuppies "
    "zombies"
)

_IRREGULAR: Final = {
    "atlantes": "atlas",
    "atlases": "atlas",
    "beeves": "beef",
    "brethren": "brother",
    "children": "child",
    "corpora": "corpus",
    "corpuses": "corpus",
    "ephemerides": "ephemeris",
    "feet": "foot",
    "ganglia": "ganglion",
    "geese": "goose",
    "genera": "genus",
    "genii": "genie",
    "graffiti": "graffito",
    "kine": "cow",
    "loaves": "loaf",
    "men": "man",
    "monies": "money",
    "mythoi": "mythos",
    "numena": "numen",
    "occipita": "occiput",
    "octopodes": "octopus",
    "opera": "opus",
    "opuses": "opus",
    "our": "my",
    "oxen": "ox",
    "penes": "penis",
    "penises": "penis",
    "people": "person",
    "teeth": "tooth",
    "testes": "testis",
    "zoa": "zoon",
}

# Regular endings; the longest one that fits decides, so a longer entry is an exception to a shorter one.
_ENDINGS: Final = {
    "s": "",
    # vowel + -ies keeps the e, except after q
    "ies": "y",
    **{f"{vowel}ies": f"{vowel}ie" for vowel in "aeiouy"},
    "quies": "quy",
    "movies": "movie",
    "ombies": "ombie",
    "series": "series",
    # sibilants and -o drop the e too
    **{f"{sound}es": sound for sound in ("ch", "sh", "ss", "x", "o")},
    "axes": "axe",
    "shoes": "shoe",
    "aliases": "alias",
    "statuses": "status",
    "buses": "bus",
    "quizzes": "quiz",
    # -f, -fe
    "ves": "fe",
    "lves": "lf",
    "rves": "rf",
    "eaves": "eaf",
    **{f"{stem}ves": f"{stem}ve" for stem in ("a", "dea", "e", "er", "f", "hel", "hi", "o", "si", "ti")},
    # Greek -sis
    **{f"{stem}ses": f"{stem}sis" for stem in ("ba", "cri", "diagno", "o", "op", "progno", "the", "y")},
    **{f"{stem}oses": f"{stem}ose" for stem in ("b", "cl", "d", "h", "n", "o", "p", "r")},
    "analyses": "analyasis",  # a slip of the reference that only compounds show: "psychoanalyses"
    # other classical plurals
    "ae": "a",
    "eaux": "eau",
    "apices": "apex",
    "indices": "index",
    "matrices": "matrix",
    "vertices": "vertex",
    **{f"{letter}i": f"{letter}us" for letter in "cioprtv"},
    "ia": "ium",
    "ta": "tum",
    "itis": "itis",
    "news": "news",
    "lice": "louse",
    "mice": "mouse",
    **_IRREGULAR,
    **{plural: plural for plural in _IE_PLURALS.split()},
}
_LONGEST_ENDING: Final = max(map(len, _ENDINGS))

# Whole words that an ending must not touch because it needs something before it.
_WHOLE_WORDS: Final = {
    "ae": "ae",
    "analyses": "analysis",
    "eaux": "eaux",
    "eaves": "eave",
    "itis": "iti",
    "ombies": "omby",
    "opses": "opse",
    "oses": "ose",
    "oxenes": "oxes",
    "oxens": "oxs",
    "ves": "ve",
    "yses": "yse",
}


def singularize(word: str) -> str:
    """Return the singular of a lower-case English ``word`` as ``pattern.en.singularize`` forms it.

    The function is total: any string has a result, non-words included ("this" -> "thi", "'" -> "'s").
    Source: the CHAIR scorer (Rohrbach et al. 2018, LisaAnne/Hallucination), PatternLite 3.6.
    """
    head, hyphen, rest = word.partition("-")
    if hyphen and rest.partition("-")[0] in PREPOSITIONS:
        return f"{singularize(head)}-{rest}"
    if word.endswith("'"):
        return f"{singularize(word[:-1])}'s"
    if word in _UNCHANGED:
        return word
    if word in _WHOLE_WORDS:
        return _WHOLE_WORDS[word]
    for length in range(min(len(word), _LONGEST_ENDING), 0, -1):
        ending = word[-length:]
        if ending in _ENDINGS:
            return word[:-length] + _ENDINGS[ending]
    return word
