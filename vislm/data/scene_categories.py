"""The sixteen categories of the generated scenes and how likely each is: four themes plus categories of any theme.

The figures are the sampling distribution of a *biased* scene: a theme is drawn by weight, each of its categories is
present independently with its popularity, each universal category likewise, and with ``EXTRA_PROBABILITY`` one more
category joins. This co-occurrence is what makes a model hallucinate, and what a context-only oracle can exploit.
"""

from __future__ import annotations

from typing import Final

THEMES: Final[dict[str, tuple[float, dict[str, float]]]] = {
    "sky": (0.35, {"star": 0.85, "moon": 0.60, "cloud": 0.35}),
    "table": (0.30, {"cup": 0.85, "fork": 0.60, "apple": 0.35}),
    "street": (0.20, {"car": 0.85, "house": 0.60, "tree": 0.35}),
    "sea": (0.15, {"boat": 0.85, "fish": 0.60, "anchor": 0.35}),
}
"""Theme name -> (probability of the theme, {category: probability that it is present in a scene of the theme})."""

UNIVERSALS: Final[dict[str, float]] = {"person": 0.45, "dog": 0.35, "bird": 0.25, "ball": 0.15}
"""Category -> probability that it is present, whatever the theme."""

EXTRA_PROBABILITY: Final = 0.10
"""Probability that one category, neither of the theme nor already present, joins the scene."""

CATEGORIES: Final[tuple[str, ...]] = (*(name for _, members in THEMES.values() for name in members), *UNIVERSALS)
"""The sixteen names in index order, which is also the order of captions: themes in table order, universals last."""
