"""Mutated annotation, question and result files: refused with our error, or read to something that holds together.

python annotations.py CASES SEED
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mutations import mutated
from outcome import Outcome, Stopwatch, in_own_process
from vision_data import VISION

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import lmm_folders

from vislm.errors import VislmError
from vislm.eval import compare
from vislm.eval.benchmarks import LMM_BENCHMARKS, load_benchmark
from vislm.eval.captions.chair_scores import read_object_table
from vislm.eval.captions.vocabulary import coco_vocabulary
from vislm.eval.coco import is_safe_name, read_captions, read_coco_folder
from vislm.eval.questions.pope_questions import read_questions
from vislm.eval.running.store import read_json, read_rows

HANG = 1.0
"""Seconds."""
_WORDS = (b"NaN", b"Infinity", b"1e999", b"null", b"true", b"-1", b'"x"', b"[]", b"{}", b'"../../x"')
_LONG = (b"9" * 400, b"[" * 4000)


def trial(cases: int, seed: int) -> Outcome:
    """Read ``cases`` mutated files of all kinds."""
    watch = Stopwatch()
    found = in_own_process("annotations.py", cases, seed)
    failures = [found["crashed"]] if "crashed" in found else found.pop("failures")
    return Outcome("mutated annotation and result files", found.pop("cases", 0), found, watch.seconds, failures)


def main(cases: int, seed: int) -> dict:
    failures, counts, slowest = [], Counter(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        kinds = _kinds(Path(scratch))
        for number in range(cases):
            path, read = kinds[number % len(kinds)]
            original = path.read_bytes()
            path.unlink()  # a new file: rewriting an old one waits for the disk
            path.write_bytes(_damaged(original, random.Random(f"{seed}/{number}")))
            began = time.perf_counter()
            name = f"{path.name}, case {number} of seed {seed}"
            try:
                fault = read()
                counts["read"] += 1
                failures += [f"{name}: {fault}"] if fault else []
            except VislmError:
                counts["refused"] += 1
            except Exception as error:  # any other class is the finding
                failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
            took = time.perf_counter() - began
            slowest = max(slowest, took)
            failures += [f"{name}: took {took:.1f} s"] if took > HANG else []
            path.unlink()
            path.write_bytes(original)
    return {
        "cases": cases,
        "kinds of files": len(kinds),
        **counts,
        "crashes, hangs, other exceptions, broken references": len(failures),
        "slowest, seconds": round(slowest, 3),
        "failures": failures,
    }


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Damage bytes, or put a value in the place of another, so that the file can be parsed more often."""
    starts = [i + 1 for i, byte in enumerate(data) if byte in b":,\t" and i + 1 < len(data)]
    if rng.random() < 0.5 or not starts or data[:2] == b"\x1f\x8b":
        return mutated(data, rng)
    start = rng.choice(starts)
    end = next((i for i in range(start, len(data)) if data[i] in b",]}\t\n"), len(data))
    return data[:start] + rng.choice(_WORDS + _LONG) + data[end:]


def _kinds(folder: Path) -> list[tuple[Path, Callable[[], str | None]]]:
    """Write a small valid file of each kind; return it with a reader that says what does not hold together."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(4)]
    boxes = [{"id": i, "image_id": i % 4, "category_id": i % 3, "bbox": [0, 1.5, 2, 3]} for i in range(6)]
    categories = [{"id": i, "name": n} for i, n in enumerate(("dog", "cat", "car"))]
    captions = [{"id": i, "image_id": i, "caption": "a dog and a cat"} for i in range(4)]
    asked = {"text": "Is there a dog in the image?", "label": "yes"}
    questions = [{"question_id": i, "image": f"{i}.jpg", **asked} for i in range(4)]
    files = {
        "instances.json": json.dumps({"images": images, "categories": categories, "annotations": boxes}),
        "captions.json": json.dumps({"images": images, "annotations": captions}),
        "questions_random.json": "\n".join(map(json.dumps, questions)),
        "questions_popular.json": json.dumps(questions, indent=1),
        "table.json": json.dumps({"1": [1, 2], "2": [3]}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "table.json.gz").write_bytes(gzip.compress(files["table.json"].encode(), mtime=0))
    done = folder / "run"
    _finished_run(folder, done)
    return [
        *_benchmark_kinds(folder),
        (folder / "instances.json", lambda: _coco_fault(folder)),
        (folder / "captions.json", lambda: _captions_fault(folder / "captions.json")),
        (folder / "questions_random.json", lambda: _questions_fault(folder / "questions_random.json")),
        (folder / "questions_popular.json", lambda: _questions_fault(folder / "questions_popular.json")),
        (folder / "table.json", lambda: _table_fault(folder / "table.json")),
        (folder / "table.json.gz", lambda: _table_fault(folder / "table.json.gz")),
        *((done / name, lambda: _run_fault(done)) for name in ("predictions.jsonl", "results.json", "run.json")),
    ]


def _benchmark_kinds(folder: Path) -> list[tuple[Path, Callable[[], str | None]]]:
    """Return every annotation file of every benchmark's folder with the benchmark's reader."""
    chosen: list[tuple[str, Callable[[Path], Any], dict[str, Any]]] = [
        *((name, getattr(lmm_folders, name), {}) for name in sorted(LMM_BENCHMARKS)),
        ("chair", lmm_folders.chair_table, {"source": "table", "ids": "ids.txt"}),
        ("retrieval", lmm_folders.coco_captions, {"captions": 0}),
        *VISION,
    ]
    kinds = []
    for number, (name, write, options) in enumerate(chosen):
        root = folder / f"{number}-{name}"
        root.mkdir()
        write(root)
        pictures = {path for sample in load_benchmark(name, root, **options).samples for path in sample.images}
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and p not in pictures and p.suffix != ".jpg"]
        kinds += [(path, partial(_benchmark_fault, name, root, options)) for path in files]
    return kinds


def _finished_run(folder: Path, out: Path) -> None:
    from vislm.data.scenes import write_scenes
    from vislm.eval.running.runner import run

    class Agrees:
        def fingerprint(self) -> dict:
            return {"model": "agrees"}

        def respond(self, batch, *, max_new_tokens) -> list[dict]:
            logits = {"yes": 1.0, "no": 0.0}
            return [{"text": "yes", "candidates": logits, "seconds": 0.0} for _ in batch]

    run(load_benchmark("pope", write_scenes(folder / "scenes", 2, 1)), Agrees(), out, limit=4)


def _benchmark_fault(name: str, root: Path, options: dict[str, Any]) -> str | None:
    """Read a benchmark and, if it is about answers, score a run that answers "yes" everywhere."""
    benchmark = load_benchmark(name, root, **options)
    ids = [sample.id for sample in benchmark.samples]
    paths = [image for sample in benchmark.samples for image in sample.images if isinstance(image, Path)]
    if len(set(ids)) != len(ids) or not all(path.resolve().is_relative_to(root.resolve()) for path in paths):
        return "ids that are not unique, or pictures outside the folder"
    if benchmark.subject != "lmm":
        return None
    rows = {s.id: {"id": s.id, "text": "yes", "likelihoods": [0.0] * len(s.choices)} for s in benchmark.samples}
    for row in rows.values():
        benchmark.parse(row)
    json.dumps([benchmark.aggregate(rows), benchmark.aggregate({}), benchmark.groups(rows)])
    return None


def _coco_fault(folder: Path) -> str | None:
    read = read_coco_folder(folder)
    names = all(is_safe_name(name) for name in read.images.values())
    known = all(o in read.categories.values() for shown in read.objects.values() for o in shown)
    return None if names and known and read.objects.keys() == read.images.keys() else "does not hold together"


def _captions_fault(path: Path) -> str | None:
    read = read_captions(path)
    texts = all(isinstance(t, str) for texts in read.values() for t in texts)
    return None if texts and all(isinstance(i, int) for i in read) else "captions that are no texts"


def _questions_fault(path: Path) -> str | None:
    read = read_questions(path)
    fine = all(q.label in ("yes", "no") and isinstance(q.text, str) and is_safe_name(q.image) for q in read)
    return None if fine and len({q.id for q in read}) == len(read) else "questions that do not hold together"


def _table_fault(path: Path) -> str | None:
    vocabulary = coco_vocabulary()
    read = read_object_table(path, vocabulary)
    return None if all(o in vocabulary.objects for shown in read.values() for o in shown) else "unknown objects"


def _run_fault(folder: Path) -> str | None:
    read_rows(folder / "predictions.jsonl")
    read_json(folder / "run.json")
    record: Any = compare.read_run(folder)
    for figure in record.figures:
        compare.figure_interval(record, figure, resamples=2)
    return None


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
