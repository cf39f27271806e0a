"""A model stand-in that really answers: it is told the scenes, and errs where its rule says so."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """What the runner reads of ``vislm.Answer``, without loading torch in every process that a test kills."""

    text: str
    candidates: dict[str, float] = field(default_factory=dict)
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    seconds: float = 0.0


class Oracle:
    """Answers POPE questions and captions from the objects of each picture, found by the picture's pixels."""

    def __init__(self, objects: Mapping[str, Sequence[str]], delay: float = 0.0, error_rate: float = 0.2) -> None:
        self.objects, self.delay, self.error_rate = objects, delay, error_rate
        self.calls = 0

    @classmethod
    def of_folder(cls, folder: Path, **options) -> Oracle:
        from vislm.eval.coco import read_coco_folder

        data = read_coco_folder(folder)
        from vislm.images import load_image

        return cls({_key(load_image(data.path(i))): data.objects[i] for i in data.images}, **options)

    def fingerprint(self) -> dict:
        return {"model": "oracle", "error_rate": self.error_rate, "interventions": []}

    def ask_many(self, images, questions, *, max_new_tokens, candidates) -> list[Answer]:
        time.sleep(self.delay)
        self.calls += 1
        answers = []
        for image, question in zip(images, questions, strict=True):
            shown = self.objects[_key(image)]
            if "Describe" in question:
                answers.append(Answer("there is " + " and ".join(f"a {o}" for o in shown) + " and a zebra ."))
                continue
            yes = any(f" {o} " in question for o in shown)
            noise = int(hashlib.sha256((_key(image) + question).encode()).hexdigest(), 16) % 1000 / 1000
            yes ^= noise < self.error_rate
            logits = {"yes": 1.0 + noise if yes else -1.0 - noise, "no": 0.0}
            answers.append(Answer("Yes." if yes else "No.", logits, 64, 16, 0.001))
        return answers


def _key(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


if __name__ == "__main__":  # a process to be launched and killed: FOLDER OUT DELAY [FOLDER THAT IT KNOWS]
    from vislm.errors import VislmError
    from vislm.eval.benchmarks import load_benchmark
    from vislm.eval.running.processes import launched
    from vislm.eval.running.runner import run

    source, target, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    try:
        with launched() as world:
            oracle = Oracle.of_folder(Path((sys.argv[4:] or [source])[0]), delay=pause)
            run(load_benchmark("pope", source), oracle, target, batch_size=4, world=world)
    except VislmError as error:
        sys.exit(f"error: {error}")
