"""What a procedural scene consists of: its instances, colours and difficulties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.shapes import Colour
from vislm.errors import UnknownName

IMAGE_SIZE = 64
"""Side of a scene in pixels."""

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 215, 50),
    "white": (240, 240, 240),
    "purple": (160, 60, 190),
}

Distribution = Literal["biased", "flat"]
"""``biased``: categories of a hidden theme occur together; ``flat``: every category is equally likely everywhere."""


@dataclass(frozen=True)
class Difficulty:
    """How hard the objects of a scene are to see.

    Attributes:
        noise: uniform integer noise in ``[-noise, noise]`` per pixel and channel.
        min_radius: smallest radius of an object in pixels (the largest is 8.5).
        faint: probability that an object is drawn faint.
        faint_contrast: range of a faint object's contrast.
        occluded: probability that a background-coloured disc hides a part of an object.
    """

    name: str
    noise: int
    min_radius: float
    faint: float
    faint_contrast: tuple[float, float]
    occluded: float


EASY = Difficulty("easy", 14, 6.0, 0.0, (1.0, 1.0), 0.0)
HARD = Difficulty("hard", 20, 5.0, 0.30, (0.15, 0.50), 0.30)
HARD2 = Difficulty("hard2", 22, 4.8, 0.35, (0.12, 0.50), 0.30)
DIFFICULTIES: dict[str, Difficulty] = {level.name: level for level in (EASY, HARD, HARD2)}


def get_difficulty(difficulty: str | Difficulty) -> Difficulty:
    """Return the difficulty of that name, or the given one unchanged; :class:`UnknownName` lists the valid names."""
    if isinstance(difficulty, Difficulty):
        return difficulty
    if difficulty not in DIFFICULTIES:
        raise UnknownName("difficulty", difficulty, DIFFICULTIES)
    return DIFFICULTIES[difficulty]


@dataclass(frozen=True)
class Instance:
    """One object: lengths in pixels of the 64 x 64 image, ``contrast`` 1 for a fully visible colour.

    ``rgb`` is the object's own shade; ``occluder`` is the hiding disc ``(x, y, radius)``, if there is one.
    """

    category: str
    colour: str
    x: float
    y: float
    r: float
    rgb: Colour
    contrast: float = 1.0
    occluder: tuple[float, float, float] | None = None

    @property
    def occluded(self) -> bool:
        """Whether a disc of the background's colour hides a part of the object."""
        return self.occluder is not None

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """COCO box ``(left, top, width, height)`` in pixels."""
        return self.x - self.r, self.y - self.r, 2 * self.r, 2 * self.r


@dataclass(frozen=True)
class Scene:
    """A drawn scene and its ground truth; ``theme`` is hidden from the picture and ``None`` for flat scenes."""

    index: int
    image: Image.Image
    theme: str | None
    background: Colour
    instances: tuple[Instance, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Present categories in index order -> number of instances."""
        names = [instance.category for instance in self.instances]
        return {name: names.count(name) for name in CATEGORIES if name in names}

    @property
    def present(self) -> list[str]:
        """Present categories in index order."""
        return list(self.counts)

    @property
    def absent(self) -> list[str]:
        """Categories without an instance, in index order."""
        counts = self.counts
        return [name for name in CATEGORIES if name not in counts]

    @property
    def colours(self) -> dict[str, str]:
        """Present categories in index order -> colour (all instances of a category share it)."""
        by_category = {instance.category: instance.colour for instance in self.instances}
        return {name: by_category[name] for name in self.counts}
