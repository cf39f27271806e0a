"""Questions about scenes and their answers, in the lower-case, space-separated text of the demonstration model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import IMAGE_SIZE, Scene
from vislm.errors import UnknownName, UsageError

NUMBERS = ("zero", "one", "two", "three")
CAPTION_QUESTION = "describe the image ."

Kind = Literal["presence", "count", "colour", "position", "caption", "vqa"]


@dataclass(frozen=True)
class Turn:
    """One question and its answer (without end-of-sequence token); ``category`` is what is asked about, if any."""

    kind: Kind
    question: str
    answer: str
    category: str | None = None


def plural(category: str) -> str:
    """Return the plural of a scene category: an added s, except for fish."""
    if category not in CATEGORIES:
        raise UnknownName("scene category", category, CATEGORIES)
    return category if category == "fish" else f"{category}s"


def presence_turn(scene: Scene, category: str) -> Turn:
    """Return ``is there a {category} in the image ?`` with ``yes .`` or ``no .``."""
    answer = "yes ." if category in scene.counts else "no ."
    return Turn("presence", f"is there a {category} in the image ?", answer, category)


def count_turn(scene: Scene, category: str) -> Turn:
    """Return ``how many {plural} are there ?`` with the number in words, ``zero`` to ``three``."""
    answer = f"{NUMBERS[scene.counts.get(category, 0)]} ."
    return Turn("count", f"how many {plural(category)} are there ?", answer, category)


def colour_turn(scene: Scene, category: str) -> Turn:
    """Return ``what color is the {category} ?`` with its colour; the category must be present."""
    if category not in scene.counts:
        raise UsageError(f"no {category} in the scene, so it has no colour; present: {', '.join(scene.present)}")
    return Turn("colour", f"what color is the {category} ?", f"{scene.colours[category]} .", category)


def position_turn(scene: Scene, category: str) -> Turn:
    """Return ``where is the {category} ?`` with ``top|bottom left|right .``; needs exactly one instance."""
    places = [(instance.x, instance.y) for instance in scene.instances if instance.category == category]
    if len(places) != 1:
        raise UsageError(f"the scene has {len(places)} instances of {category}; a position needs exactly one")
    x, y = places[0]
    vertical = "top" if y < IMAGE_SIZE / 2 else "bottom"
    horizontal = "left" if x < IMAGE_SIZE / 2 else "right"
    return Turn("position", f"where is the {category} ?", f"{vertical} {horizontal} .", category)


def caption(scene: Scene) -> str:
    """Return the scene's caption, for example ``there is a red star , two blue moons and a white dog .``."""
    parts = [
        f"a {scene.colours[name]} {name}" if n == 1 else f"{NUMBERS[n]} {scene.colours[name]} {plural(name)}"
        for name, n in scene.counts.items()
    ]
    listed = parts[0] if len(parts) == 1 else f"{' , '.join(parts[:-1])} and {parts[-1]}"
    return f"there is {listed} ."


def caption_turn(scene: Scene) -> Turn:
    """Return ``describe the image .`` with the scene's caption."""
    return Turn("caption", CAPTION_QUESTION, caption(scene))


def singletons(scene: Scene) -> list[str]:
    """Return the categories with exactly one instance, in index order."""
    return [name for name, n in scene.counts.items() if n == 1]
