"""Zero-shot classification: the text classifier, names and templates, models of open_clip."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vision.class_folders import COLOURS, WNIDS, colour_folders, picture, tiny_clip

from vislm.errors import AnnotationError, CheckpointError, UnknownName, UsageError
from vislm.eval.protocol import Asked
from vislm.eval.running.runner import run
from vislm.eval.running.subjects import open_subject
from vislm.eval.vision import zero_shot
from vislm.eval.vision.class_lists import ClassList, imagenet_classes
from vislm.eval.vision.open_clip_model import open_clip_model
from vislm.eval.vision.zero_shot_model import class_texts, templates_of, text_classifier


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(tmp_path) -> Path:
    root = colour_folders(tmp_path / "data", "test", 2)
    (root / "classes.txt").write_text("".join(f"{name}\ta {name} thing\n" for name in COLOURS))
    return root


def test_a_whole_run(clip, folder, tmp_path) -> None:
    task = zero_shot.load(folder, classes="classes.txt", templates="simple")
    with open_subject("zero_shot", f"{clip}@random") as subject:
        results = run(task, subject, tmp_path / "out", batch_size=3)
    assert results["n"] == 8
    assert results["metrics"]["top5"] == 100.0
    assert results["visual_tokens"] == 16
    assert results["config"]["protocol.templates"] == "simple"
    assert results["config"]["benchmark"] == "zero_shot"
    assert results["config"]["preprocessing.resize_mode"] == "shortest"


def test_the_classifier_is_open_clip_s(clip) -> None:
    names, templates = ["cat", "dog", "tench"], open_clip.OPENAI_IMAGENET_TEMPLATES
    with open_clip_model(f"{clip}@random") as loaded:
        ours = text_classifier(loaded, names, templates_of("openai"))
        theirs = open_clip.build_zero_shot_classifier(loaded.model, loaded.tokenizer, names, templates)
    torch.testing.assert_close(ours, theirs.T, atol=1e-5, rtol=1e-4)


def test_the_logits_are_100_times_the_cosine(clip, folder) -> None:
    task = zero_shot.load(folder, classes="classes.txt", templates="photo")
    sample, image = task.samples[0], Image.open(task.pictures[0].path)
    with open_subject("zero_shot", f"{clip}@random") as subject:
        row = subject.respond([Asked(sample, (image,))], max_new_tokens=1)[0]
        loaded = subject._clip
        with torch.no_grad():
            seen = loaded.model.encode_image(loaded.preprocess(image)[None], normalize=True)
            prompts = loaded.tokenizer([f"a photo of a a {name} thing." for name in COLOURS])
            logits = (100 * seen @ loaded.model.encode_text(prompts, normalize=True).T)[0]
    assert row["text"] == list(COLOURS)[int(logits.argmax())]
    assert row["logits"] == pytest.approx(logits.sort(descending=True).values.tolist(), abs=1e-3)


def test_texts_are_encoded_once(clip, folder, tmp_path, monkeypatch) -> None:
    from vislm.eval.vision import zero_shot_model

    calls = []

    def counted(*arguments):
        calls.append(1)
        return text_classifier(*arguments)

    monkeypatch.setattr(zero_shot_model, "text_classifier", counted)
    with open_subject("zero_shot", f"{clip}@random") as subject:
        run(zero_shot.load(folder, classes="classes.txt", templates="photo"), subject, tmp_path / "out", batch_size=1)
    assert len(calls) == 1


def test_impossible_classes_of_a_variant_are_out(clip, tmp_path) -> None:
    among = imagenet_classes("a").possible
    picture(tmp_path / "imagenet-a" / WNIDS[among[0]] / "x.jpg", COLOURS["red"])
    task = zero_shot.load(tmp_path, variant="a", templates="photo")
    with open_subject("zero_shot", f"{clip}@random") as subject:
        row = subject.respond([Asked(task.samples[0], (Image.new("RGB", (32, 32)),))], max_new_tokens=1)[0]
    assert set(row["top"]) <= {WNIDS[i] for i in among}


def test_names_and_templates(tmp_path, folder) -> None:
    assert len(class_texts(imagenet_classes())) == 1000
    assert class_texts(imagenet_classes())[0] == "tench"
    assert (len(templates_of("openai")), len(templates_of("simple"))) == (80, 7)
    assert templates_of("openai")[0] == "a bad photo of a {}."
    assert templates_of("photo") == ["a photo of a {}."]
    with pytest.raises(UsageError, match="2 classes have no names for prompts"):
        class_texts(ClassList(("a", "b")))
    (folder / "t.txt").write_text("a {} here\n\nthe {}\n")
    task = zero_shot.load(folder, classes="classes.txt", templates="t.txt")
    assert templates_of(task.samples[0].templates) == ["a {} here", "the {}"]
    assert task.protocol["templates"] != zero_shot.load(folder, classes="classes.txt").protocol["templates"]
    (folder / "t.txt").write_text("a here\n")
    with pytest.raises(AnnotationError, match=r"expected one template a line, each with one \{\}"):
        zero_shot.load(folder, classes="classes.txt", templates="t.txt")
    with pytest.raises(UnknownName, match="did you mean 'openai'"):
        zero_shot.load(folder, classes="classes.txt", templates="opnai")


def test_weights_from_a_file_and_a_folder(clip, tmp_path) -> None:
    torch.manual_seed(5)
    model = open_clip.create_model(clip)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    image = Image.new("RGB", (40, 30), (200, 30, 60))
    with open_clip_model(f"{clip}@{tmp_path}/w.safetensors") as loaded:
        first = loaded.image_features(loaded.pixels([image]))
        assert torch.equal(loaded.model.visual.proj, model.visual.proj)
        assert loaded.fingerprint()["weights"] not in ("random", "")
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(clip), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    with open_clip_model(str(folder)) as loaded:
        assert tuple(loaded.fingerprint()["preprocessing.mean"]) == (0.5, 0.5, 0.5)
        assert not torch.allclose(loaded.image_features(loaded.pixels([image])), first)
    with open_clip_model(f"{clip}@{tmp_path}/w.safetensors:mean=0.5,std=0.4,resize_mode=squash") as loaded:
        assert tuple(loaded.fingerprint()["preprocessing.std"]) == (0.4, 0.4, 0.4)
        assert loaded.fingerprint()["preprocessing.resize_mode"] == "squash"


def test_a_folder_is_the_same_model_wherever_it_lies(clip, tmp_path, monkeypatch) -> None:
    model = open_clip.create_model(clip)
    folder = tmp_path / "here" / "model"
    folder.mkdir(parents=True)
    config = {"model_cfg": open_clip.get_model_config(clip), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    shutil.copytree(folder, tmp_path / "there" / "copy")
    monkeypatch.chdir(folder.parent)

    def identity_of(place: object) -> dict:
        with open_clip_model(str(place)) as loaded:
            return loaded.fingerprint()

    absolute = identity_of(folder)
    assert absolute == identity_of("model") == identity_of(tmp_path / "there" / "copy")
    assert absolute["model"] == clip
    assert str(tmp_path) not in json.dumps(absolute, default=str)
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    changed = identity_of(folder)
    differing = {k for k in changed if changed[k] != absolute.get(k)}
    assert differing == {"preprocessing.mean", "tokenizer"}


def test_merging_in_the_image_tower(clip, folder, tmp_path) -> None:
    task = zero_shot.load(folder, classes="classes.txt", templates="photo")
    with open_subject("zero_shot", f"{clip}@random", ["tome:r=4"]) as subject:
        results = run(task, subject, tmp_path / "out")
    assert (results["visual_tokens"], results["visual_tokens_kept"]) == (16, 8)
    with open_subject("zero_shot", f"{clip}@random") as subject:
        assert run(task, subject, tmp_path / "all")["flops"] > results["flops"]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("ViT-B-32", UsageError, "names no weights: write ViT-B-32@FILE.safetensors, ViT-B-32@TAG"),
        ("ViT-B-322@random", UnknownName, "did you mean 'ViT-B-32'"),
        ("ViT-B-32@opnai", UnknownName, "unknown tag of ViT-B-32 'opnai'; did you mean 'openai'"),
        ("ViT-B-32@{0}/w.safetensors", UsageError, r"trained with different quick_gelu; say what yours are like"),
        ("ViT-B-32@{0}/w.safetensors:like=opnai", UnknownName, "did you mean 'openai'"),
        ("ViT-B-16-SigLIP@random", CheckpointError, "tokenizer of ViT-B-16-SigLIP is no part of open_clip"),
        ("{1}@{0}/w.safetensors", CheckpointError, "open_clip cannot make"),
        ("{1}@{0}/x.safetensors", CheckpointError, "open_clip cannot make"),
        ("{1}@random:crop_pct=1", UnknownName, "unknown model option 'crop_pct'"),
        ("{0}", CheckpointError, "open_clip cannot make"),
    ],
)
def test_what_models_cannot_be(model, error, message, clip, tmp_path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(error, match=message):
        with open_clip_model(model.format(tmp_path, clip)):
            pass


def test_heads_and_dtypes(clip) -> None:
    with pytest.raises(UsageError, match="acts in a language model"):
        with open_clip_model(f"{clip}@random", heads=["vhr:alpha=2"]):
            pass
    with pytest.raises(UnknownName, match="did you mean 'float16'"):
        with open_clip_model(f"{clip}@random", dtype="float17"):
            pass


def test_like_chooses_the_activation(clip, monkeypatch) -> None:
    """A tag of OpenAI's weights stands for QuickGELU, as the published models of that architecture differ in it."""
    from vislm.eval.vision import open_clip_model as module

    tags = {"ours": {"quick_gelu": True, "mean": (0.1, 0.2, 0.3)}, "theirs": {}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags[tag])
    with module.open_clip_model(f"{clip}@random:like=ours") as loaded:
        assert loaded.fingerprint()["quick_gelu"] is True
        assert tuple(loaded.fingerprint()["preprocessing.mean"]) == (0.1, 0.2, 0.3)
    with module.open_clip_model(f"{clip}@random") as loaded:
        assert loaded.fingerprint()["quick_gelu"] is False


def test_command(monkeypatch, capsys, clip, folder, tmp_path) -> None:
    from vislm.cli import main

    command = ["eval", "zero_shot:classes=classes.txt,templates=photo", "--data", folder, "--model", f"{clip}@random"]
    monkeypatch.setattr(sys, "argv", ["vislm", *map(str, command), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert int(stop.value.code or 0) == 0
    assert "zero_shot: 8 samples" in capsys.readouterr().out
