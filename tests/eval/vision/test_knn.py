"""k-NN: the vote, the two runs, resuming, training features of another model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from vision.class_folders import TINY, colour_folders, picture

from vislm.errors import AnnotationError, RunFolderError, UnknownName, UsageError
from vislm.eval.checks import check_folder
from vislm.eval.compare import compare, read_run
from vislm.eval.protocol import Asked, Sample
from vislm.eval.running.runner import run
from vislm.eval.running.store import read_rows
from vislm.eval.running.subjects import open_subject
from vislm.eval.vision import knn
from vislm.eval.vision.features import encode, read_bank
from vislm.eval.vision.knn_vote import knn_votes, nearest
from vislm.golden import verify_folder

GOLDEN = Path(__file__).parents[2] / "golden" / "knn" / "dinov2_t007.safetensors"
WIDE = "vit_tiny_patch16_224@random:img_size=32,patch_size=8,embed_dim=64,depth=2,num_heads=2"


@pytest.fixture
def folder(tmp_path) -> Path:
    colour_folders(tmp_path / "data", "train", 6)
    return colour_folders(tmp_path / "data", "test", 2)


def whole(folder: Path, out: Path, model: str = TINY, **options) -> dict:
    task = knn.load(folder, k=3, ks=(1, 5), **options)
    with open_subject("features", model) as subject:
        run(task.before, subject, out / "train", batch_size=4)
        return run(task.after(out / "train"), subject, out, batch_size=4)


def test_any_changed_output_is_noticed(tmp_path) -> None:
    with safe_open(GOLDEN, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for name in [k for k in tensors if k.startswith("out.")]:
        wrong = {**tensors, name: tensors[name] + 0.001}
        save_file(wrong, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert verdict.status == "fail", name


def test_a_fixture_without_features_is_unknown(tmp_path) -> None:
    metadata = {"method": "k-NN classification (DINO protocol)", "kwargs": "{}"}
    save_file({"in.query_labels": torch.zeros(1)}, tmp_path / "case.safetensors", metadata)
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "unknown"


@given(n=st.integers(1, 40), k=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_nearest_is_that_of_all_similarities(n, k, chunk, seed) -> None:
    torch.manual_seed(seed)
    bank = nn.functional.normalize(torch.randn(n, 5, dtype=torch.float64), dim=-1)
    queries = nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=-1)
    values, places = nearest(queries, bank, min(k, n), chunk=chunk)
    expected, order = (queries @ bank.T).sort(dim=-1, descending=True)
    torch.testing.assert_close(values, expected[:, : min(k, n)])
    assert torch.equal(places, order[:, : min(k, n)])


def test_nearer_neighbours_weigh_more() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    votes = knn_votes(torch.tensor([[2.0, 0.0]]), bank, torch.tensor([1, 0, 0]), 2, [1, 3], temperature=0.07)
    weights = (torch.tensor([1.0, 0.8, 0.6]) / 0.07).softmax(0)
    torch.testing.assert_close(votes[3], torch.stack([weights[1:].sum(), weights[0]])[None])
    torch.testing.assert_close(votes[1], torch.stack([torch.tensor(0.0), weights[0]])[None])
    soft = knn_votes(torch.tensor([[2.0, 0.0]]), bank, torch.tensor([1, 0, 0]), 2, [3], temperature=10.0)
    assert soft[3].argmax() == 0


def test_a_whole_run(folder, tmp_path) -> None:
    results = whole(folder, tmp_path / "out")
    assert results["n"] == 8
    assert results["metrics"]["n_train"] == 24
    assert results["metrics"]["top1"] == results["metrics"]["top1_k3"] == 100.0
    assert {"top1_k1", "top1_k5", "top5_k5"} <= results["metrics"].keys()
    row = read_rows(tmp_path / "out" / "predictions.jsonl")["red/00.png"]
    assert (row["text"], row["truth"], row["score"]) == ("red", "red", 1.0)
    assert row["votes"]["1"] == ["red"]


def test_the_vote_is_that_of_the_model_s_features(folder, tmp_path) -> None:
    """Everything again by hand: timm's features of each picture, all similarities at once."""
    whole(folder, tmp_path / "out")
    with open_subject("features", TINY) as subject:
        loaded = subject._loaded
        task = knn.load(folder, k=3, ks=(1, 5))

        def embedded(pictures) -> torch.Tensor:
            from PIL import Image

            pixels = torch.stack([loaded.transform(Image.open(p.path)) for p in pictures])
            with torch.no_grad():
                tokens = loaded.model.forward_features(pixels)
            return nn.functional.normalize(tokens[:, 0], dim=-1)

        votes = knn_votes(
            embedded(task.pictures),
            embedded(task.before.pictures),
            torch.tensor([p.labels[0] for p in task.before.pictures]),
            4,
            [5],
        )
    rows = read_rows(tmp_path / "out" / "predictions.jsonl")
    expected = [sorted(("red", "green", "blue", "white"))[i] for i in votes[5].argmax(-1)]
    assert [rows[p.id]["votes"]["5"][0] for p in task.pictures] == expected


def test_features_are_kept_exactly_or_in_half(folder, tmp_path) -> None:
    whole(folder, tmp_path / "a")
    whole(folder, tmp_path / "b", store="float16")
    labels = knn.load(folder, k=1).votes.labels
    (exact, classes), (half, _) = (read_bank(tmp_path / name / "train", labels) for name in "ab")
    assert (exact.dtype, half.dtype) == (np.float32, np.float16)
    assert exact.shape == half.shape == (24, 32)
    assert np.array_equal(exact.astype(np.float16), half)
    assert np.allclose(np.linalg.norm(exact, axis=1), 1, atol=1e-6)
    assert classes.tolist() == sorted(classes.tolist())


class Dying:
    """Dies after some batches."""

    def __init__(self, subject, batches: int) -> None:
        self.subject, self.left, self.seen = subject, batches, []

    def fingerprint(self):
        return self.subject.fingerprint()

    def respond(self, batch, *, max_new_tokens: int):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += [asked.sample.id for asked in batch]
        return self.subject.respond(batch, max_new_tokens=max_new_tokens)


def test_a_killed_run_resumes(folder, tmp_path) -> None:
    task = knn.load(folder, k=3, ks=(1, 5))
    with open_subject("features", TINY) as subject:
        first = Dying(subject, 3)
        with pytest.raises(KeyboardInterrupt):
            run(task.before, first, tmp_path / "out" / "train", batch_size=4)
        second = Dying(subject, 99)
        run(task.before, second, tmp_path / "out" / "train", batch_size=4)
        assert len(first.seen) == len(second.seen) == 12
        assert not set(first.seen) & set(second.seen)
        results = run(task.after(tmp_path / "out" / "train"), subject, tmp_path / "out")
    assert results["metrics"] == whole(folder, tmp_path / "again")["metrics"]


def test_runs_can_be_compared(folder, tmp_path) -> None:
    whole(folder, tmp_path / "a")
    whole(folder, tmp_path / "b", WIDE)
    found = compare(read_run(tmp_path / "a"), read_run(tmp_path / "b"), resamples=20)
    assert {c.figure.name for c in found} == {"top1", "top5"}


def test_training_features_of_another_model_are_refused(folder, tmp_path) -> None:
    whole(folder, tmp_path / "out")
    bank = str(tmp_path / "out" / "train")
    with open_subject("features", f"{TINY},crop_pct=0.5") as subject:
        with pytest.raises(UsageError, match=r"another model \(preprocessing.crop_pct: 0.9 there, 0.5 now\)"):
            run(knn.load(folder, k=3, ks=(1,), bank=bank), subject, tmp_path / "other")
    with open_subject("features", TINY) as subject:
        again = run(knn.load(folder, k=3, ks=(1,), bank=bank), subject, tmp_path / "again")
        assert again["metrics"]["top1"] == 100.0
        (tmp_path / "out" / "train" / "results.json").unlink()
        with pytest.raises(RunFolderError, match="holds no finished run of training features"):
            run(knn.load(folder, k=3, bank=bank), subject, tmp_path / "third")
        with pytest.raises(UsageError, match="the training pictures were not embedded"):
            run(knn.load(folder, k=3), subject, tmp_path / "fourth")


def test_damaged_training_features_are_refused(tmp_path) -> None:
    good = {"id": "a/0.png", "text": "", "features": encode(np.ones(3, np.float32), "float32"), "store": "float32"}
    for bad, message in (
        ({**good, "id": "b/0.png"}, "line 2: no feature of a training picture"),
        ({**good, "features": "A"}, "line 2: no feature"),
        ({**good, "features": encode(np.ones(2, np.float32), "float32")}, "line 2: 2 numbers; expected 3"),
    ):
        (tmp_path / "predictions.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        with pytest.raises(RunFolderError, match=message):
            read_bank(tmp_path, {"a/0.png": 0})
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="is empty"):
        read_bank(tmp_path, {})


@pytest.mark.parametrize(("pool", "size"), [("head", 32), ("cls", 32), ("avg", 32)])
def test_pools(pool, size) -> None:
    with open_subject("features", f"{TINY},pool={pool}") as subject:
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            found, tokens = subject.embed(pixels), subject._loaded.model.forward_features(pixels)
        expected = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
        torch.testing.assert_close(found, expected)
        assert found.shape == (2, size)
        assert subject.fingerprint()["pool"] == pool


def test_pools_of_merged_tokens_count_every_patch() -> None:
    with open_subject("features", f"{TINY},pool=avg", ["tome:r=4"]) as subject:
        with torch.no_grad():
            pixels = torch.randn(2, 3, 32, 32)
            found, tokens = subject.embed(pixels), subject._loaded.model.forward_features(pixels)
        sizes = subject._loaded.merging.sizes[:, 1:, None]
        assert sizes.sum(1).unique().tolist() == [16.0]
        torch.testing.assert_close(found, (tokens[:, 1:] * sizes).sum(1) / 16)


def test_pools_of_other_models() -> None:
    with open_subject("features", "resnet10t@random:pool=avg") as subject:
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            head = subject._loaded.model.forward_head(subject._loaded.model.forward_features(pixels), pre_logits=True)
            torch.testing.assert_close(subject.embed(pixels), head)
    with (
        open_subject("features", "resnet10t@random:pool=cls") as subject,
        pytest.raises(UsageError, match="class token"),
    ):
        subject.embed(torch.randn(1, 3, 64, 64))
    with pytest.raises(UnknownName, match="unknown pool 'clss'; did you mean 'cls'"):
        with open_subject("features", f"{TINY},pool=clss"):
            pass


def test_other_samples_are_refused() -> None:
    from PIL import Image

    with open_subject("features", TINY) as subject, pytest.raises(UsageError, match="is nothing to embed"):
        subject.respond([Asked(Sample("a", (), ""), (Image.new("RGB", (9, 9)),))], max_new_tokens=1)


def test_layouts_and_options(folder, tmp_path) -> None:
    with pytest.raises(AnnotationError, match="holds no folder train"):
        knn.load(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere is not a folder"):
        knn.load(folder, test="nowhere")
    with pytest.raises(UsageError, match=r"k=25, but .* holds 24 pictures"):
        knn.load(folder, k=25)
    with pytest.raises(UsageError, match="greater than 0"):
        knn.load(folder, temperature=0)
    with pytest.raises(UsageError, match="expected float32 or float16"):
        knn.load(folder, store="int8")  # pyright: ignore[reportArgumentType]
    assert knn.load(folder).votes.ks == (10, 20)
    picture(folder / "test" / "pink" / "0.png", (250, 100, 200))
    (folder / "train" / "red" / "notes.txt").write_text("")
    report = check_folder("knn:k=3", folder)
    assert any("pink: is none of the 4 classes" in fault for fault in report.faults)
    assert any(fault.startswith("training: ") and "notes.txt: no picture" in fault for fault in report.faults)
    assert any("no vote of [100, 200] neighbours" in line for line in report.suspicions)


def test_command(monkeypatch, capsys, folder, tmp_path) -> None:
    from vislm.cli import main

    command = ["eval", "knn:k=3,ks=1+5", "--data", folder, "--model", f"{TINY},pool=cls", "--out", tmp_path / "out"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["vislm", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert int(stop.value.code or 0) == 0
        assert "n_train" in capsys.readouterr().out
    assert (tmp_path / "out" / "train" / "results.json").is_file()
