"""Image-text retrieval: golden fixture, ties, readers, whole runs with an oracle and with a tiny open_clip model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from vision_folders import draw, dump, edit, karpathy

from vislm.errors import AnnotationError, ImageError, RunFolderError, UnknownName, UsageError
from vislm.eval.benchmarks import suspicions
from vislm.eval.checks import check_folder
from vislm.eval.running.runner import rescore, run
from vislm.eval.specs import open_benchmark
from vislm.eval.vision import retrieval
from vislm.eval.vision.embeddings import packed, unpacked
from vislm.eval.vision.retrieval_metrics import ranks, recalls
from vislm.golden.verify import verify_folder

GOLDEN = Path(__file__).parents[2] / "golden" / "retrieval"


# --- the metric


def test_every_changed_output_is_noticed(tmp_path) -> None:
    with safe_open(GOLDEN / "n60.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for name in [k for k in tensors if k.startswith("out.")]:
        save_file({**tensors, name: tensors[name] - 1e-3}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name
    swapped = tensors["in.text_features"].flip(0).contiguous()
    save_file({**tensors, "in.text_features": swapped}, tmp_path / "case.safetensors", metadata)
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "fail"


def test_any_own_text_counts_for_a_picture_and_every_text_for_itself() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])  # the second text of picture 0 is about picture 1
    found = recalls(images, texts, [0, 0, 1], ks=(1, 2))
    assert found["image_to_text_R@1"] == 0.5  # picture 1 finds the stray text first
    assert found["image_to_text_R@2"] == 1.0
    assert found["text_to_image_R@1"] == pytest.approx(2 / 3)
    assert found["mean_recall"] == pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4)


def test_of_equal_similarities_the_earlier_comes_first() -> None:
    same = np.ones((4, 3))
    to_image, to_text = ranks(same, same, [0, 1, 2, 3])
    assert to_image.tolist() == to_text.tolist() == [0, 1, 2, 3]
    to_image, to_text = ranks(same, same[[0, 0, 0, 0, 0]], [3, 2, 1, 0, 0])
    assert to_image.tolist() == [3, 2, 1, 0, 0]
    assert to_text.tolist() == [3, 2, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_as_by_sorting(data) -> None:
    images = data.draw(st.integers(1, 6))
    owner = [*range(images), *data.draw(st.lists(st.integers(0, images - 1), max_size=8))]
    values = st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any)  # small integers tie often
    a = np.array([data.draw(values) for _ in range(images)], float)
    b = np.array([data.draw(values) for _ in owner], float)
    near = np.round(
        (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T, 9
    )
    to_image, to_text = ranks(a, b, owner)
    by_text = [sorted(range(images), key=lambda i, row=row: (-row[i], i)) for row in near]
    assert to_image.tolist() == [order.index(own) for order, own in zip(by_text, owner, strict=True)]
    by_image = [sorted(range(len(owner)), key=lambda t, row=row: (-row[t], t)) for row in near.T]
    assert to_text.tolist() == [[owner[t] for t in order].index(i) for i, order in enumerate(by_image)]


def test_many_queries_are_compared_in_parts() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(600, 8))
    texts = images[rng.permutation(600)] * 1.0
    owner = np.argmax(texts @ images.T / np.linalg.norm(images, axis=1), axis=1)
    assert recalls(images, texts, owner.tolist())["mean_recall"] == 1.0


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), [0, 1], "expected"),
        (np.ones((2, 3)), np.ones((2, 3)), [0], "1 owners"),
        (np.ones((2, 3)), np.ones((2, 3)), [0, 0], "every picture needs a text"),
        (np.ones((1, 3)), np.ones((2, 3)), [0, 1], "one of the pictures"),
        (np.zeros((1, 3)), np.ones((1, 3)), [0], "picture 0 is zero"),
        (np.ones((1, 3)), np.full((1, 3), np.nan), [0], "text 0 is zero or not finite"),
    ],
)
def test_embeddings_that_do_not_fit(images, texts, owner, message) -> None:
    with pytest.raises(UsageError, match=message):
        recalls(images, texts, owner)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_embeddings_survive_packing(values) -> None:
    vector = np.array(values, np.float32)
    assert unpacked(packed(vector), "x").tolist() == vector.tolist()


# --- readers


def test_flickr_in_karpathys_layout(tmp_path) -> None:
    task = open_benchmark("retrieval", karpathy(tmp_path))
    assert [s.id for s in task.samples] == ["0", "1", "2"]
    assert task.samples[1].choices == tuple(f"Picture 1, sentence {i}." for i in range(5))
    assert task.protocol["split"] == "karpathy-test"
    assert task.protocol["n_captions"] == 15
    every = open_benchmark("retrieval:captions=0,split=karpathy-train", tmp_path)
    assert len(every.samples[0].choices) == 6
    assert check_folder("retrieval", tmp_path, decode=True).faults == []
    (odd,) = suspicions("retrieval", task)
    assert odd.startswith("3 pictures with 15 captions; the published test split has 1000 with 5000")
    with pytest.raises(UsageError, match="captions=-1"):
        open_benchmark("retrieval:captions=-1", tmp_path)


def plain(root: Path, pictures: int = 7) -> Path:
    """captions.json and images/, in part with equal captions."""
    rows = [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in range(pictures)]
    texts = [(10 + n, f"thing {n} or {i}" if i else "a thing") for n in range(pictures) for i in range(2 + n % 2)]
    captions = [{"id": k, "image_id": image, "caption": text} for k, (image, text) in enumerate(texts)]
    for n in range(pictures):
        draw(root / "images" / f"{n}.jpg", n)
    dump(root / "captions.json", {"images": rows, "annotations": captions})
    return root


def test_a_plain_folder_and_its_suspicions(tmp_path) -> None:
    task = open_benchmark("retrieval", plain(tmp_path))
    assert task.protocol["n_captions"] == 17
    assert suspicions("retrieval", task) == ["7 pictures have fewer than 5 captions, first 10"]


FAULTS = [
    (lambda r: (r / "images" / "1.jpg").unlink(), "sample 1: the picture "),
    (lambda r: (r / "images" / "1.jpg").write_bytes(b"\xff\xd8 nothing"), "sample 1: cannot use image"),
    (lambda r: edit(r / "dataset_flickr30k.json", lambda d: d["images"][1].update(sentences=[])), "has no sentences"),
    (lambda r: edit(r / "dataset_flickr30k.json", lambda d: d["images"][1].update(imgid=0)), "imgid '0' appears twice"),
    (lambda r: edit(r / "dataset_flickr30k.json", lambda d: d["images"][1].update(filename="../x")), "outside its"),
    (lambda r: edit(r / "dataset_flickr30k.json", lambda d: d.pop("images")), "'images' is NoneType"),
    (lambda r: (r / "dataset_flickr30k.json").write_text('{"images": ['), "is not valid JSON"),
    (lambda r: (r / "dataset_flickr30k.json").unlink(), "holds no captions"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_named(number, tmp_path) -> None:
    break_it, message = FAULTS[number]
    break_it(karpathy(tmp_path))
    assert any(message in fault for fault in check_folder("retrieval", tmp_path, decode=True).faults)


# --- whole runs


class Embedder:
    """Embeds a text by its hash; a picture as the first of its sentences, or as its pixels."""

    def __init__(self, knows: bool = True, die_after: int | None = None) -> None:
        self.knows, self.left, self.asked = knows, die_after, []

    def fingerprint(self) -> dict:
        return {"model": "embedder", "knows": self.knows}

    def respond(self, batch, *, max_new_tokens) -> list[dict]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.asked += [asked.sample.id for asked in batch]
        return [
            {
                "text": "",
                "image": packed(_vector(a.sample.choices[-1] if self.knows else a.images[0].tobytes())),
                "texts": [packed(_vector(text)) for text in a.sample.choices],
                "seconds": 0.0,
            }
            for a in batch
        ]


def _vector(source: str | bytes) -> np.ndarray:
    data = source if isinstance(source, bytes) else source.encode()
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8).astype(np.float32) - 127.5


def test_an_oracle_finds_everything(tmp_path) -> None:
    results = run(open_benchmark("retrieval", plain(tmp_path)), Embedder(), tmp_path / "out")
    assert results["metrics"]["image_to_text_R@1"] == 1.0
    assert results["metrics"]["text_to_image_R@10"] == 1.0
    assert 7 / 17 <= results["metrics"]["text_to_image_R@1"] < 1.0  # "a thing" is a caption of every picture
    assert results["score"]["n"] == 0
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert row["values"]["cosine"] == pytest.approx(row["answer"])


def test_the_result_is_the_same_for_any_batch_and_after_a_kill(tmp_path) -> None:
    task = open_benchmark("retrieval", plain(tmp_path))
    whole = run(task, Embedder(knows=False), tmp_path / "a", batch_size=32)
    for size in (1, 3):
        part = run(task, Embedder(knows=False), tmp_path / f"b{size}", batch_size=size, workers=size - 1)
        assert part["metrics"] == whole["metrics"]
    with pytest.raises(KeyboardInterrupt):
        run(task, Embedder(knows=False, die_after=2), tmp_path / "c", batch_size=2)
    rest = Embedder(knows=False)
    assert run(task, rest, tmp_path / "c", batch_size=2)["metrics"] == whole["metrics"]
    assert rest.asked == ["14", "15", "16"]
    assert rescore(task, tmp_path / "c" / "predictions.jsonl")["metrics"] == whole["metrics"]
    edit(tmp_path / "captions.json", lambda d: d["annotations"][0].update(caption="another"))
    with pytest.raises(RunFolderError, match="samples"):
        run(open_benchmark("retrieval", tmp_path), Embedder(knows=False), tmp_path / "c")


def test_broken_pictures_are_listed_and_leave_the_gallery(tmp_path) -> None:
    (plain(tmp_path) / "images" / "3.jpg").write_bytes(b"nothing")
    task = open_benchmark("retrieval", tmp_path)
    with pytest.raises(ImageError, match=r"3\.jpg"):
        run(task, Embedder(), tmp_path / "a")
    results = run(task, Embedder(), tmp_path / "b", on_error="skip")
    assert [fault["id"] for fault in results["broken"]] == ["13"]
    assert results["metrics"]["n"] == 6
    assert results["metrics"]["n_captions"] == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "row 10, picture: expected an embedding"),
        ({"image": "%%"}, "expected an embedding as base64"),
        ({"image": "AAA="}, "expected an embedding as base64"),
        ({"image": ""}, "is empty or holds"),
        ({"image": packed(np.array([np.inf]))}, "not finite"),
        ({"texts": []}, "one embedding under 'texts' for each of 2 captions"),
        ({"texts": [packed(np.ones(3)), packed(np.ones(4))]}, r"row 10: embeddings of \[3, 4, 32\] values"),
    ],
)
def test_rows_that_hold_something_else(change, message, tmp_path) -> None:
    task = open_benchmark("retrieval", plain(tmp_path))
    run(task, Embedder(), tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**rows[0], **change}, *rows[1:]]))
    with pytest.raises(AnnotationError, match=message):
        rescore(task, path)


def test_nothing_scored_is_a_warning(tmp_path) -> None:
    task = open_benchmark("retrieval", plain(tmp_path))
    metrics = task.aggregate({})
    assert metrics["mean_recall"] == 0.0
    assert metrics["warnings"]
    with pytest.raises(UsageError, match="is not retrieval"):
        retrieval.suspicions(open_benchmark("coco_captions", tmp_path))


# --- open_clip


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    towers = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    dump(
        folder / "open_clip_config.json", {"model_cfg": towers, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    )
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**towers).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.slow
def test_an_open_clip_model(tiny_clip, tmp_path) -> None:
    from vislm.eval.running.subjects import open_subject

    task = open_benchmark("retrieval", plain(tmp_path))
    results = {}
    for size in (1, 3, 32):
        with open_subject(task.subject, str(tiny_clip)) as subject:
            results[size] = run(task, subject, tmp_path / f"out{size}", batch_size=size)
    assert results[1]["metrics"] == results[3]["metrics"] == results[32]["metrics"]
    assert results[1]["config"] == results[32]["config"]
    assert results[1]["visual_tokens"] == 16
    rows = [json.loads(line) for line in (tmp_path / "out3" / "predictions.jsonl").read_text().splitlines()]
    assert [len(row["texts"]) for row in rows] == [2, 3, 2, 3, 2, 3, 2]
    assert np.linalg.norm(unpacked(rows[0]["image"], "x")) == pytest.approx(1.0)
    with open_subject(task.subject, str(tiny_clip), ["tome:r=3"]) as subject:
        fewer = run(task, subject, tmp_path / "merged")
    assert fewer["visual_tokens_kept"] == 10
    assert fewer["config"]["interventions"] != results[1]["config"]["interventions"]
    with pytest.raises(UnknownName):
        open_subject("image_texts", str(tiny_clip))
