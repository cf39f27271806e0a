"""What a method is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vislm.lmm.interventions.heads import HeadStage
from vislm.lmm.interventions.language import LanguageStage
from vislm.lmm.interventions.logits import LogitsStage, SearchStage
from vislm.lmm.interventions.prompt import ProbeStage, PromptStage
from vislm.lmm.interventions.rows import BiasStage, EditStage
from vislm.lmm.interventions.tower import TowerMergeStage, TowerStage

if TYPE_CHECKING:
    from vislm.lmm.adapters import Adapter


Stage = (
    TowerStage
    | TowerMergeStage
    | ProbeStage
    | PromptStage
    | LanguageStage
    | BiasStage
    | EditStage
    | HeadStage
    | LogitsStage
    | SearchStage
)


@runtime_checkable
class Intervention(Protocol):
    """A method: its options are the dataclass's fields, its behaviour is what ``plan`` returns."""

    @property
    def name(self) -> str:
        """The name in the registry, the command line and reports."""
        ...

    def plan(self, adapter: Adapter) -> Sequence[Stage]:
        """Return the stages for this model, or raise ``PlanConflict`` / ``UsageError`` if it cannot act on it."""
        ...
