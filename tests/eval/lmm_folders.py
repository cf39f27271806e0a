"""Tiny folders in the official layouts of the LMM benchmarks, and a model that says what it is told to."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = ["red", "red", "red", "red", "blue", "blue", "a dog", "green", "green", "green"]


def draw(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), ((37 * colour) % 256, 80, 120)).save(path)
    return path


def encoded(colour: int = 0) -> str:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), ((37 * colour) % 256, 80, 120)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def dump(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Load, change in place (or by the returned value) and save a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    dump(path, data if changed is None else changed)


def pope(root: Path) -> Path:
    for split in ("random", "popular", "adversarial"):
        rows = []
        for number, name in enumerate(["a.jpg", "b.jpg"]):
            for i in range(6):
                text = f"Is there a thing{i if i % 2 == 0 else split + str(i)} in the image?"
                label = "yes" if i % 2 == 0 else "no"
                rows.append({"question_id": 6 * number + i + 1, "image": name, "text": text, "label": label})
        root.mkdir(parents=True, exist_ok=True)
        (root / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    for number, name in enumerate(["a.jpg", "b.jpg"]):
        draw(root / "images" / name, number)
    return root


def amber(root: Path) -> Path:
    kinds = [
        ("discriminative-attribute-state", "yes"),
        ("discriminative-attribute-state", "no"),
        ("discriminative-hallucination", "no"),
        ("relation", "no"),
        ("discriminative-relation", "yes"),
    ]
    notes: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["sky", "man", "man"], "hallu": ["cloud", "dog"]},
        {"id": 2, "type": "generative", "truth": ["grass"], "hallu": ["tree"]},
    ]
    notes += [{"id": 3 + n, "type": kind, "truth": truth} for n, (kind, truth) in enumerate(kinds)]
    dump(root / "data" / "annotations.json", notes)
    related = {"sky": [], "man": ["person"], "dog": ["puppy"], "cloud": [], "grass": ["lawn"], "tree": [], "light": []}
    dump(root / "data" / "relation.json", related)
    (root / "data" / "safe_words.txt").write_text("light\nlawnmower")
    ask = [{"id": 3 + n, "image": f"AMBER_{1 + n % 2}.jpg", "query": f"Is it {n}?"} for n in range(len(kinds))]
    dump(root / "data" / "query" / "query_discriminative.json", ask)
    tell = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in (1, 2)]
    dump(root / "data" / "query" / "query_generative.json", tell)
    for n in (1, 2):
        draw(root / "image" / f"AMBER_{n}.jpg", n)
    return root


def mme(root: Path) -> Path:
    for task, stems in (("existence", ["000", "001"]), ("artwork", ["10"]), ("code_reasoning", ["7", "8"])):
        for stem in stems:
            folder = root / task
            text = f"Is it {stem}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            apart = task == "artwork"
            draw(folder / "images" / f"{stem}.jpg" if apart else folder / f"{stem}.png", int(stem))
            target = folder / "questions_answers_YN" / f"{stem}.txt" if apart else folder / f"{stem}.txt"
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
    return root


MMBENCH = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]


def mmbench_rows() -> list[list[str]]:
    return [
        ["1", "Which is red?", "nan", "an apple", "the sky", "", "", "A", "color", encoded(1), "attribute"],
        ["2", 'What "is" it?', "Look.", "cat", "dog", "cow", "", "C", "identity", encoded(2), "object"],
        ["3", "And this?", "", "cat", "dog", "cow", "hen", "B", "identity", "2", "object"],
    ]


def mmbench(root: Path, rows: Sequence[Sequence[str]] | None = None) -> Path:
    import csv

    root.mkdir(parents=True, exist_ok=True)
    with (root / "MMBench_DEV_EN.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([MMBENCH, *(rows or mmbench_rows())])
    return root


def gqa(root: Path) -> Path:
    questions = {
        "201": {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
        "202": {"question": "What is it?", "imageId": "n2", "answer": "T-shirt", "types": {"structural": "query"}},
        "203": {"question": "Who is it?", "imageId": 7, "answer": "man"},
    }
    dump(root / "questions1.2" / "testdev_balanced_questions.json", questions)
    for n, name in enumerate(("n1", "n2", "7")):
        draw(root / "images" / f"{name}.jpg", n)
    return root


def scienceqa(root: Path) -> Path:
    base = {"hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science", "split": "test"}
    problems = {
        "4": {**base, "question": "Which?", "choices": ["one", "two"], "answer": 1, "image": "image.png"},
        "5": {**base, "question": "What?", "choices": ["a", "b", "c"], "answer": 0, "image": None, "hint": "Read."},
        "6": {**base, "question": "Who?", "choices": ["x", "y", "z"], "answer": 2, "image": "image.png", "hint": "Hm."},
        "7": {
            **base,
            "question": "Why?",
            "choices": ["x", "y"],
            "answer": 0,
            "image": None,
            "subject": "language science",
        },
    }
    dump(root / "problems.json", problems)
    dump(root / "pid_splits.json", {"test": list(problems), "minitest": ["4"], "train": []})
    for n in (4, 6):
        draw(root / "test" / str(n) / "image.png", n)
    return root


def textvqa(root: Path) -> Path:
    rows = [
        {"question_id": 34602 + n, "image_id": f"im{n}", "question": "what is it?", "answers": WORDS} for n in range(3)
    ]
    dump(root / "TextVQA_0.5.1_val.json", {"data": rows})
    dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "im0", "ocr_tokens": ["STOP", "5th"]}]})
    for n in range(3):
        draw(root / "train_images" / f"im{n}.jpg", n)
    return root


def vqav2(root: Path) -> Path:
    asked = [{"question_id": 42000 + n, "image_id": 42 + n, "question": "What colour?"} for n in range(3)]
    kinds = ["other", "yes/no", "other"]
    notes = [
        {
            "question_id": q["question_id"],
            "image_id": q["image_id"],
            "answer_type": kind,
            "answers": [{"answer": w, "answer_id": i + 1, "answer_confidence": "yes"} for i, w in enumerate(WORDS)],
        }
        for q, kind in zip(asked, kinds, strict=True)
    ]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    dump(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked[:1]})
    for n in range(3):
        draw(root / "val2014" / f"COCO_val2014_{42 + n:012d}.jpg", n)
    draw(root / "test2015" / f"COCO_test2015_{42:012d}.jpg")
    return root


def vizwiz(root: Path) -> Path:
    rows = [
        {
            "image": f"VizWiz_val_0000000{n}.jpg",
            "question": "What is this?",
            "answers": [{"answer": w, "answer_confidence": "yes"} for w in WORDS],
            "answer_type": "other" if n else "unanswerable",
            "answerable": 1,
        }
        for n in range(3)
    ]
    dump(root / "Annotations" / "val.json", rows)
    dump(root / "Annotations" / "test.json", [{"image": "t.jpg", "question": "What?"}])
    for n in range(3):
        draw(root / "val" / f"VizWiz_val_0000000{n}.jpg", n)
    draw(root / "test" / "t.jpg")
    return root


CAPTIONS = {
    11: ["A dog sits on a mat.", "The brown dog is sitting on a mat.", "Dog on the mat"],
    12: ["Two cats play with a ball of wool.", "Cats playing with wool", "A pair of cats and a ball"],
    13: ["A man can't ride the horse.", "A man rides a horse.", "man on a horse"],
}


def coco_captions(root: Path) -> Path:
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in CAPTIONS]
    pairs = [(i, text) for i, texts in CAPTIONS.items() for text in texts]
    notes = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(pairs, start=1)]
    dump(root / "annotations" / "captions_val2014.json", {"images": images, "annotations": notes})
    karpathy = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012d}.jpg",
            "imgid": n,
            "cocoid": i,
            "split": "test" if n < 2 else "val",
            "sentences": [{"raw": text} for text in CAPTIONS[i]],
        }
        for n, i in enumerate(CAPTIONS)
    ]
    dump(root / "dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    for i in CAPTIONS:
        draw(root / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    return root


def chair(root: Path) -> Path:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in CAPTIONS]
    names = ["person", "dog", "cat", "horse"]
    boxes = [
        {"id": 10 * i + k, "image_id": i, "category_id": (i + k) % 4 + 1, "bbox": [0, 0, 5, 6.5]}
        for i in CAPTIONS
        for k in range(2)
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    dump(root / "instances.json", {"images": images, "categories": categories, "annotations": boxes})
    pairs = [(i, text) for i, texts in CAPTIONS.items() for text in texts]
    notes = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(pairs, start=1)]
    dump(root / "captions.json", {"annotations": notes})
    for i in CAPTIONS:
        draw(root / "images" / f"{i}.jpg", i)
    return root


def chair_table(root: Path, lying: Sequence[int] = (11, 12)) -> Path:
    """CHAIR without annotations; of its three pictures those of ``lying`` are there."""
    root.mkdir(parents=True, exist_ok=True)
    table = json.dumps({"11": [1], "12": [1, 3], "13": []}).encode()
    (root / "chair_ground_truth_pattern2014.json.gz").write_bytes(gzip.compress(table, mtime=0))
    (root / "ids.txt").write_text("".join(f"{i}\n" for i in lying))
    for i in lying:
        draw(root / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    return root


FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "amber": amber,
    "chair": chair,
    "coco_captions": coco_captions,
    "gqa": gqa,
    "mmbench": mmbench,
    "mme": mme,
    "pope": pope,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "vqav2": vqav2,
}


class Canned:
    """Says what it is told for each sample id, or for each group of samples; remembers the prompts."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers, self.prompts = answers, dict[str, str]()

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "canned"}

    def respond(self, batch, *, max_new_tokens: int) -> list[dict[str, Any]]:
        self.prompts |= {asked.sample.id: asked.sample.prompt for asked in batch}
        return [{"text": self.answers[asked.sample.id], "seconds": 0.0} for asked in batch]
