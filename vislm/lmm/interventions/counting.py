"""How many tokens a stage will leave, asked ahead of any run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vislm.lmm.choosing.tokens import token_count

if TYPE_CHECKING:
    from vislm.lmm.adapters.base import Grid


Positions = Literal["original", "contiguous"]
"""Position ids of the tokens that stay: as in the full prompt, or numbered anew without gaps."""


@dataclass(frozen=True)
class Alive:
    """What one image has left when a stage begins, for counting ahead of any run (``expected``)."""

    tokens: int
    """In the tower: patches of one crop. Behind it: visual tokens, separators included."""
    total: int
    """In the tower: patches of the full crop. Behind it: tokens of the full image."""
    first: int = 0
    """Inside the language model: ``tokens`` at the method's first stage there."""
    crops: tuple[int, ...] = ()
    """At a prompt stage: tokens alive of each crop (or frame); separators belong to none."""
    grids: tuple[Grid, ...] = ()
    """At a prompt stage of a full image: the rectangles that its tokens form."""

    @property
    def candidates(self) -> int:
        """Tokens that are no separators."""
        return sum(self.crops)

    def after(self, keep: int | float) -> int:
        """Return what is left when ``keep`` candidates stay; separators go with the first that does not."""
        count = token_count(keep, self.candidates)
        return self.tokens if count == self.candidates else count


Expected = Callable[[Alive], int]
"""Returns how many tokens a stage will leave."""
