"""What a difference between two runs means: better answers, another threshold, fewer words.

A method against hallucination can win by saying less, or by saying no more often. CHAIR is therefore read beside recall
and length, accuracy beside the share of yes and the AUROC of the yes-no logit, and a gain is not accepted from CHAIR
where length changes by more than 30 %, nor from accuracy where the share of yes moves by more than 10 points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vislm.eval.compare import Comparison

LENGTH_LIMIT = 0.3
"""Change of the mean length, as a share of the other run's, beyond which CHAIR alone shows no gain."""
YES_LIMIT = 0.1
"""Change of the share of yes beyond which accuracy alone shows no gain."""
SAYS_LESS, FEWER = "says less", "names fewer objects, wrong and right"
Figures = Mapping[str, Comparison]
"""Name of a figure -> how it differs."""
_HALLUCINATED, _RECALL = ("CHAIR_i", "CHAIR"), ("Recall", "Cover")
_ROUNDING = 1e-9  # a change of exactly the limit is none beyond it


@dataclass(frozen=True)
class Effect:
    """What a run does compared with another one. A difference counts where its 95 % interval leaves out zero."""

    answers: str
    """Of yes/no questions: helps, shifts the threshold, ...; empty: no difference."""
    captions: str
    """Of descriptions: helps, says less, ...; empty: no difference."""
    yes_moved: float | None = None
    """Change of the share of yes where it is beyond ``YES_LIMIT``."""
    length_changed: float | None = None
    """Change of the mean length, as a share of the other run's, where it is beyond ``LENGTH_LIMIT``."""

    def __str__(self) -> str:
        words = [f"answers: {self.answers}"] if self.answers else []
        words += [f"captions: {self.captions}"] if self.captions else []
        return "; ".join(words) or "no difference beyond chance"


def effect(answers: Figures, captions: Figures) -> Effect:
    """Return what a run does to yes/no answers and to descriptions.

    Args:
        answers: differences, this run minus the other one: "accuracy", "yes_ratio", "auroc".
        captions: the same of "CHAIR_i" (or AMBER's "CHAIR"), "Recall" (or "Cover") and "Length". Both may be empty.
    """
    yes_moved, changed = _yes_moved(answers), _length_changed(captions)
    return Effect(_of_answers(answers, yes_moved), _of_captions(captions, changed), yes_moved, changed)


def notes(found: Sequence[Comparison]) -> list[str]:
    """Return in plain words what the differences between runs A and B (A - B) do not show; nothing if all is well."""
    of_all = {c.figure.name: c for c in found if c.part == "all"}
    return [*_answer_notes(of_all), *_caption_notes(of_all)]


def _of_answers(found: Figures, yes_moved: float | None) -> str:
    accuracy, auroc = _sign(found, "accuracy"), _sign(found, "auroc")
    if accuracy > 0:
        if "auroc" not in found:
            return "more are right, without AUROC" + (" and with another share of yes" if yes_moved else "")
        return "helps" if auroc > 0 else "shifts the threshold"
    if accuracy < 0:
        if "auroc" not in found:
            return "fewer are right, without AUROC"
        return "hurts" if auroc < 0 else "shifts the threshold for the worse"
    return f"{'better' if auroc > 0 else 'worse'} ranked, accuracy not changed" if auroc else ""


def _of_captions(found: Figures, changed: float | None) -> str:
    hallucinated, recall, length = _sign(found, *_HALLUCINATED), _sign(found, *_RECALL), _sign(found, "Length")
    if hallucinated < 0:
        if length < 0:
            return SAYS_LESS
        if recall < 0:
            return FEWER
        return "fewer hallucinations at another length" if changed else "helps"
    if hallucinated > 0:
        return "hurts" if recall <= 0 else "says more, right and wrong"
    return f"names {'more' if recall > 0 else 'fewer'} objects" if recall else ""


def _answer_notes(found: Figures) -> list[str]:
    if "accuracy" not in found or not {"yes_ratio", "auroc"} & found.keys():
        return []
    better, _, seen = _toward_better(found, "accuracy")
    said, accuracy, auroc = effect(seen, {}), seen["accuracy"], seen.get("auroc")
    result = []
    if said.answers == "shifts the threshold" and auroc is not None:
        result.append(
            f"{better} has the higher accuracy ({_points(accuracy)}), but not the higher AUROC ({_points(auroc)}): "
            "the runs differ in the threshold between yes and no, not in what they see."
        )
    if _sign(seen, "accuracy") > 0 and auroc is None:
        result.append(
            f"{better} has the higher accuracy ({_points(accuracy)}); without AUROC this may be a mere shift of the "
            "threshold between yes and no."
        )
    if said.yes_moved is not None:
        yes = found["yes_ratio"]
        result.append(
            f"The share of yes moves by {100 * abs(said.yes_moved):.1f} points (A {yes.a:.3f}, B {yes.b:.3f}), more "
            f"than {100 * YES_LIMIT:.0f}: accuracy alone shows no gain."
        )
    if auroc is not None and auroc.n != accuracy.n:
        result.append(
            f"AUROC is over {auroc.n} of the {accuracy.n} samples of the accuracy: the others lack the logits of yes "
            "and no in A or B."
        )
    return result


def _caption_notes(found: Figures) -> list[str]:
    name = next((n for n in _HALLUCINATED if n in found), None)
    if name is None:
        return []
    better, other, seen = _toward_better(found, name, lower=True)
    said, result = effect({}, seen), []
    if said.captions in (SAYS_LESS, FEWER):
        also = "says less" if said.captions == SAYS_LESS else "names fewer objects"
        result.append(f"{better} hallucinates less ({name}), but also {also} than {other}: compare recall and length.")
    if said.length_changed is not None:
        length = found["Length"]
        result.append(
            f"{better}'s descriptions are {100 * abs(said.length_changed):.0f} % "
            f"{'longer' if said.length_changed > 0 else 'shorter'} (mean length A {length.a:.1f}, B {length.b:.1f}), "
            f"more than {100 * LENGTH_LIMIT:.0f} %: {name} alone shows no gain."
        )
    return result


def _yes_moved(found: Figures) -> float | None:
    moved = found["yes_ratio"].difference.value if "yes_ratio" in found else 0.0
    return moved if abs(moved) > YES_LIMIT + _ROUNDING else None


def _length_changed(found: Figures) -> float | None:
    if "Length" not in found or not found["Length"].b:
        return None
    changed = found["Length"].a / found["Length"].b - 1.0
    return changed if abs(changed) > LENGTH_LIMIT + _ROUNDING else None


def _sign(found: Figures, *names: str) -> int:
    """Return 1 or -1 where the interval of the first of these figures leaves out zero, else 0."""
    d = next((found[name].difference for name in names if name in found), None)
    return 0 if d is None else (d.low > 0) - (d.high < 0)


def _toward_better(found: Figures, name: str, *, lower: bool = False) -> tuple[str, str, Figures]:
    """Return which run is better by a figure, which is the other one, and all differences as better minus other."""
    value = found[name].difference.value
    if (value > 0) == lower and value:
        return "B", "A", {key: _turned(c) for key, c in found.items()}
    return "A", "B", found


def _turned(c: Comparison) -> Comparison:
    d = c.difference
    turned = replace(d, value=-d.value, low=-d.high, high=-d.low, wins=d.losses, losses=d.wins)
    return replace(c, a=c.b, a_error=c.b_error, b=c.a, b_error=c.a_error, difference=turned)


def _points(c: Comparison) -> str:
    return f"{c.difference.value:+.3f}"
