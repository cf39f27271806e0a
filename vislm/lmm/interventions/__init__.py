"""What a method may ask of a running model: the vocabulary shared by token pruning and head editing.

A method is a frozen dataclass with a ``name`` and one function, ``plan(adapter)``, that returns stages. A stage says
where it acts, which signal it needs there, and what it decides from it; the session does the rest. Stages see views:
plain records of tensors, so that the deciding functions stay pure and testable without any model.
"""

from vislm.lmm.interventions.counting import Alive, Expected, Positions
from vislm.lmm.interventions.heads import HeadStage, HeadView
from vislm.lmm.interventions.language import LanguageSelection, LanguageStage, LanguageView
from vislm.lmm.interventions.logits import LogitsStage, LogitsView, SearchStage, SearchView
from vislm.lmm.interventions.method import Intervention, Stage
from vislm.lmm.interventions.prompt import ImageView, Kept, ProbeStage, PromptStage, Selection
from vislm.lmm.interventions.rows import BiasStage, BiasView, EditStage, EditView, PrepareView
from vislm.lmm.interventions.tower import TowerMergeStage, TowerRecord, TowerSignal, TowerStage, TowerView

__all__ = [
    "Alive",
    "BiasStage",
    "BiasView",
    "EditStage",
    "EditView",
    "Expected",
    "HeadStage",
    "HeadView",
    "ImageView",
    "Intervention",
    "Kept",
    "LanguageSelection",
    "LanguageStage",
    "LanguageView",
    "LogitsStage",
    "LogitsView",
    "Positions",
    "PrepareView",
    "ProbeStage",
    "PromptStage",
    "SearchStage",
    "SearchView",
    "Selection",
    "Stage",
    "TowerMergeStage",
    "TowerRecord",
    "TowerSignal",
    "TowerStage",
    "TowerView",
]
