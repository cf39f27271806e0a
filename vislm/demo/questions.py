"""What the demonstration asks about a scene, and which answers are right."""

from __future__ import annotations

from dataclasses import dataclass

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import Scene
from vislm.data.turns import Turn, caption_turn, colour_turn, count_turn, position_turn, presence_turn, singletons
from vislm.eval.captions.chair_scores import score_caption
from vislm.eval.captions.vocabulary import vocabulary_of
from vislm.lmm.model import LMM


@dataclass(frozen=True)
class Reply:
    """One question, the model's answer, the true one, and whether they agree."""

    question: str
    answer: str
    truth: str
    right: bool


def scene_turns(scene: Scene) -> list[Turn]:
    """Return the questions about a scene with their answers: presence, count, colour, place, and a caption."""
    present, absent = scene.present, scene.absent
    turns = [presence_turn(scene, c) for c in (*present[:3], *absent[:3])]
    turns += [count_turn(scene, c) for c in present[:2]] + [colour_turn(scene, c) for c in present[:3]]
    return [*turns, *(position_turn(scene, c) for c in singletons(scene)[:1]), caption_turn(scene)]


def answered_right(scene: Scene, turn: Turn, text: str) -> bool:
    """Return whether an answer is right; a caption is if it names every category and no other."""
    if turn.kind != "caption":
        return text == turn.answer
    score = score_caption(text, scene.present, vocabulary_of(list(CATEGORIES)))
    return not score.hallucinated and score.recall == 1.0


def ask_about(lmm: LMM, scenes: list[Scene]) -> list[list[Reply]]:
    """Ask all questions about every scene, each in one batch; return the replies per scene."""
    replies = []
    for scene in scenes:
        turns = scene_turns(scene)
        answers = lmm.ask_many([scene.image] * len(turns), [t.question for t in turns])
        replies.append(
            [
                Reply(t.question, a.text, t.answer, answered_right(scene, t, a.text))
                for t, a in zip(turns, answers, strict=True)
            ]
        )
    return replies
