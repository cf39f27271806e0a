"""Classifiers: preprocessing, what a model's outputs are, merging of tokens, what ``--model`` says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from vision.class_folders import COLOURS, TINY, WNIDS, colour_folders, picture

from vislm.errors import CheckpointError, RunFolderError, UnknownName, UsageError, VislmError
from vislm.eval.protocol import Asked, Sample
from vislm.eval.running.runner import run
from vislm.eval.running.store import read_rows
from vislm.eval.running.subjects import open_subject
from vislm.eval.vision import imagenet
from vislm.eval.vision.class_lists import ClassList, ClassSample, imagenet_classes
from vislm.eval.vision.classifier import best
from vislm.eval.vision.timm_model import timm_model

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for index in (0, 1, 2, 3, 500):
        path = tmp_path / "data" / "val" / WNIDS[index] / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def asked(image: Image.Image, classes: ClassList) -> Asked:
    return Asked(ClassSample("a", (), "", classes=classes), (image,))


def test_the_outputs_are_those_of_timm(tmp_path, folder) -> None:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    config = resolve_data_config({"img_size": 32, "crop_pct": 0.8}, model=model)
    transform = create_transform(**config)
    spec = f"vit_tiny_patch16_224@{tmp_path / 'w.safetensors'}:{TINY.partition(':')[2]},crop_pct=0.8"
    with open_subject("classifier", spec) as subject:
        run(imagenet.load(folder), subject, tmp_path / "out", batch_size=2)
        fingerprint = subject.fingerprint()
        row = subject.respond(
            [asked(Image.open(folder / "val" / WNIDS[0] / "x.png"), imagenet_classes())], max_new_tokens=1
        )
    with torch.no_grad():
        logits = model(transform(Image.open(folder / "val" / WNIDS[0] / "x.png"))[None])[0]
    assert row[0]["top"] == [WNIDS[i] for i in logits.topk(5).indices]
    assert row[0]["logits"] == pytest.approx(logits.topk(5).values.tolist(), abs=1e-3)
    assert fingerprint["preprocessing.mean"] == [0.5, 0.5, 0.5]
    assert fingerprint["preprocessing.crop_pct"] == 0.8
    assert len(fingerprint["weights"]) == 16


def test_batches_change_nothing(tmp_path, folder) -> None:
    found = []
    for size in (1, 2, 5):
        with open_subject("classifier", TINY) as subject:
            run(imagenet.load(folder), subject, tmp_path / str(size), batch_size=size)
        rows = read_rows(tmp_path / str(size) / "predictions.jsonl")
        found.append({i: (row["top"], row["score"]) for i, row in rows.items()})
    assert len(found[0]) == 5
    assert found[0] == found[1] == found[2]


def test_impossible_classes_are_out_before_the_best_is_chosen() -> None:
    scores = torch.zeros(1000)
    among = imagenet_classes("a").possible
    scores[0], scores[among[7]], scores[among[3]] = 9.0, 2.0, 1.0
    assert best(scores, imagenet_classes())["text"] == WNIDS[0]
    found = best(scores, imagenet_classes("a"))
    assert found["top"][:2] == [WNIDS[among[7]], WNIDS[among[3]]]
    assert found["logits"][:2] == [2.0, 1.0]


def test_other_numbers_of_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="the model has 10 outputs, the data 1000 classes"):
        best(torch.zeros(10), imagenet_classes())
    assert len(best(torch.zeros(3), ClassList(("a", "b", "c")))["top"]) == 3


def test_samples_without_classes_are_refused() -> None:
    with open_subject("classifier", TINY) as subject:
        with pytest.raises(UsageError, match="names no classes"):
            subject.respond([Asked(Sample("a", (), ""), (Image.new("RGB", (9, 9)),))], max_new_tokens=1)
        with pytest.raises(UsageError, match="has 0 pictures; expected one"):
            subject.respond([Asked(ClassSample("a", (), ""), ())], max_new_tokens=1)


def test_outputs_that_are_not_finite_are_refused(tmp_path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["head.bias"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with open_subject(
        "classifier", f"vit_tiny_patch16_224@{tmp_path}/w.safetensors:{TINY.partition(':')[2]}"
    ) as subject:
        with pytest.raises(VislmError, match="not finite"):
            subject.respond([asked(Image.new("RGB", (9, 9)), imagenet_classes())], max_new_tokens=1)


def test_merging_lowers_tokens_and_flops(tmp_path, folder) -> None:
    results = {}
    for spec in ("", "tome:r=4", "tome:keep=5", "tome:keep=0.5,prop_attn=false"):
        with open_subject("classifier", TINY, [spec] if spec else []) as subject:
            results[spec] = run(imagenet.load(folder), subject, tmp_path / spec.replace(":", "_"))
    assert {spec: (r["visual_tokens"], r["visual_tokens_kept"]) for spec, r in results.items()} == {
        "": (16, 16),
        "tome:r=4": (16, 8),
        "tome:keep=5": (16, 5),
        "tome:keep=0.5,prop_attn=false": (16, 8),
    }
    flops = [r["flops"] for r in results.values()]
    assert flops[0] > flops[1] > flops[2]
    assert "ToMe(keep=5" in results["tome:keep=5"]["config"]["interventions"][0]
    with open_subject("classifier", TINY, ["tome:r=4"]) as subject:
        with pytest.raises(RunFolderError, match="interventions"):
            run(imagenet.load(folder), subject, tmp_path / "tome_keep=5")


def test_flops_of_a_transformer() -> None:
    """Patches, per block the projections, attention and MLP, and the head: 2 per multiply-add."""
    n, d, head = 17, 32, 1000
    block = 2 * n * d * (3 * d) + 2 * (2 * n * n * d) + 2 * n * d * d + 2 * (2 * n * d * 4 * d)
    with open_subject("classifier", TINY) as subject:
        row = subject.respond([asked(Image.new("RGB", (32, 32)), imagenet_classes())], max_new_tokens=1)[0]
    assert row["flops"] == 2 * 16 * 3 * 64 * d + 2 * block + 2 * d * head


@pytest.mark.parametrize(
    ("prune", "heads", "message"),
    [
        (["flowcut:keep=4"], [], "only tome merges tokens"),
        (["tome:r=1", "tome:r=1"], [], "only tome merges tokens"),
        (["tome:positions=original"], [], "positions and calibrate concern a language model"),
        (["tome:r=1,keep=3"], [], "give one of them"),
        (["tome:keep=1"], [], "leaves at least"),
        ([], ["vhr:alpha=2"], "acts in a language model"),
    ],
)
def test_methods_that_do_not_fit(prune, heads, message) -> None:
    with pytest.raises(UsageError, match=message):
        with open_subject("classifier", TINY, prune, heads):
            pass


def test_merging_needs_a_plain_transformer() -> None:
    with pytest.raises(UsageError, match="expected a plain vision transformer"):
        with open_subject("classifier", "resnet10t@random", ["tome:r=1"]):
            pass
    with open_subject("classifier", "resnet10t@random:img_size=32") as subject:
        row = subject.respond([asked(Image.new("RGB", (32, 32)), imagenet_classes())], max_new_tokens=1)[0]
    assert "visual_tokens" not in row
    assert row["flops"] > 0


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet10t", UsageError, "names no weights: write resnet10t@FILE.safetensors, resnet10t@pretrained"),
        ("resnet10@random", UnknownName, "unknown model 'resnet10'; did you mean"),
        ("resnet10t@none.safetensors", CheckpointError, "no such file: none.safetensors"),
        ("resnet10t@{0}/x.pth", CheckpointError, "is no .safetensors file"),
        ("resnet10t@{0}/x.safetensors", CheckpointError, "cannot read .* as safetensors"),
        ("resnet10t@{0}/y.safetensors", CheckpointError, "does not fit ResNet"),
        ("resnet10t@randomm", UnknownName, "did you mean 'random'"),
        ("resnet10t@random:crop=1", UnknownName, "unknown model option 'crop'; did you mean 'crop_pct'"),
        ("resnet10t@random:crop_pct=big", UsageError, "expected float"),
        ("resnet10t@random:crop_pct=0", UsageError, "have to be positive"),
        ("resnet10t@random:mean=0.5+0.5", UsageError, "mean: 2 numbers"),
        ("resnet10t@random:interpolation=cubic", UnknownName, "did you mean 'bicubic'"),
        ("resnet10t@random:crop_pct=0.9,std", UsageError, "'std' is not of the form option=value"),
        ("{0}", CheckpointError, "timm cannot make"),
        ("dinat_s_tiny@pretrained", UsageError, "has no weights to download"),
        ("vislm-tiny", UsageError, "is a language model that sees; this benchmark evaluates a vision model"),
    ],
)
def test_what_models_cannot_be(model, error, message, tmp_path) -> None:
    (tmp_path / "x.pth").write_bytes(b"x")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(error, match=message):
        with timm_model(model.format(tmp_path)):
            pass


def test_dtypes() -> None:
    with pytest.raises(UnknownName, match="did you mean 'float16'"):
        with timm_model(TINY, dtype="float17"):
            pass
    with timm_model(TINY, dtype="bfloat16") as loaded:
        assert loaded.fingerprint()["dtype"] == "bfloat16"


def test_a_folder_of_timms(tmp_path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **OPTIONS)
    from timm.models import save_for_hf

    config = {"model_args": OPTIONS}
    save_for_hf(model, str(tmp_path / "model"), model_config=config, safe_serialization=True)
    with timm_model(str(tmp_path / "model")) as loaded:
        assert torch.equal(loaded.model.head.weight, model.head.weight)


def identity_of(model: object) -> dict:
    with timm_model(str(model)) as loaded:
        return loaded.fingerprint()


def test_a_folder_is_the_same_model_wherever_it_lies(tmp_path, monkeypatch) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **OPTIONS)
    folder = tmp_path / "here" / "model"
    save_for_hf(model, str(folder), model_config={"model_args": OPTIONS}, safe_serialization=True)
    absolute = identity_of(folder)
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, tmp_path / "there" / "copy")
    assert absolute == identity_of("model") == identity_of("./model/") == identity_of(tmp_path / "there" / "copy")
    assert absolute["model"] == "vit_tiny_patch16_224"
    assert str(tmp_path) not in json.dumps(absolute)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_heads"] = 2 * OPTIONS["num_heads"]  # the same weights in another architecture
    (folder / "config.json").write_text(json.dumps(config))
    changed = identity_of(folder)
    assert {k for k in changed if changed[k] != absolute[k]} == {"architecture.settings"}
    torch.nn.init.zeros_(model.head.weight)
    save_for_hf(model, str(tmp_path / "other"), model_config={"model_args": OPTIONS}, safe_serialization=True)
    other = identity_of(tmp_path / "other")
    assert {k for k in other if other[k] != absolute[k]} == {"weights"}


def test_a_yaml_file_is_the_same_model_wherever_it_lies(tmp_path) -> None:
    from vislm.backbones.variants import variant

    text = variant("dinat_s_tiny").path.read_text(encoding="utf-8")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.yaml").write_text(text)
    a, b = (identity_of(f"{tmp_path / n / n}.yaml@random:num_classes=3") for n in ("a", "b"))
    assert a == b
    assert str(tmp_path) not in json.dumps(a)


def test_a_backbone_of_vislm() -> None:
    from vislm.backbones.variants import variant

    published = variant("dinat_s_tiny").published
    with timm_model("dinat_s_tiny@random:num_classes=3") as loaded:
        config = loaded.fingerprint()
        assert config["preprocessing.crop_pct"] == published.crop_pct
        assert config["preprocessing.input_size"] == [3, published.input_size, published.input_size]
        assert config["preprocessing.mean"] == pytest.approx([0.485, 0.456, 0.406])
        assert loaded.model.get_classifier().out_features == 3


def test_command(monkeypatch, capsys, tmp_path) -> None:
    from vislm.cli import main

    root = colour_folders(tmp_path / "data", "test", 2)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    command = ["eval", "imagenet:classes=classes.txt", "--data", root, "--model", f"{TINY},num_classes=4"]
    monkeypatch.setattr(sys, "argv", ["vislm", *map(str, command), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert int(stop.value.code or 0) == 0
    out = capsys.readouterr().out
    assert "imagenet: 8 samples" in out
    assert "top5" in out
    assert "100.0" in out
    picture(root / "test" / "red" / "broken.png", COLOURS["red"]).write_bytes(b"broken")
    monkeypatch.setattr(sys, "argv", ["vislm", "data", "check", "imagenet:classes=classes.txt", str(root), "--decode"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "broken.png: not an image" in capsys.readouterr().out
