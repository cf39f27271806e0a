"""Whole analyses, their files, the page and the command."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import sys

import pytest
import timm
import torch
import typer
from PIL import Image

from vislm import FlowCut, RandomPruning, load_lmm, registry
from vislm.analysis import Analysis, analyze_lmm, analyze_vit
from vislm.analysis.results import padded_stack
from vislm.cli.analyze import analyze
from vislm.data.scenes import generate_scenes
from vislm.errors import AnnotationError, PlanConflict, UnknownName, UsageError
from vislm.report.analysis.explorer import explorer_data, script_safe
from vislm.report.analysis.heatmaps import colour_range, head_sheet, short
from vislm.report.analysis.page import write_report

QUESTION = "is there a car in the image ?"


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return [scene.image for scene in generate_scenes(2, 5)]


@pytest.fixture(scope="module")
def of_lmm(scenes) -> Analysis:
    return analyze_lmm(load_lmm(), scenes, QUESTION, box=(0.25, 0.72, 0.51, 0.99), expected="yes", max_new_tokens=4)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), **sizes).eval()
    with torch.no_grad():
        for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.attn.qkv.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def of_vit(vit) -> Analysis:
    return analyze_vit(
        vit, torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)), name="v", patch_size=16
    )


def test_every_part_of_an_lmm_leaves_finite_numbers(of_lmm) -> None:
    assert "skipped" not in of_lmm.header
    for name in of_lmm.header["measures"]:
        value = of_lmm.tensors[name]
        assert value.shape == (4, 4), name
        assert value.isfinite().all(), name
    prefixes = {name.split(".")[0] for name in of_lmm.tensors}
    assert prefixes >= {"visual", "sinks", "dormant", "massive", "divergence", "retrieval", "rollout", "lens"}
    assert prefixes >= {"importance", "knockout", "tower", "maps"}
    assert of_lmm.header["answers"][0] == "yes ."
    assert of_lmm.tensors["maps.image_rows"].shape == (3, 4, 4, 64)
    hits, mass = of_lmm.tensors["retrieval.box_hits"], of_lmm.tensors["retrieval.box_mass"]
    assert (hits >= 0).all()
    assert (mass <= of_lmm.tensors["maps.image_rows"].float().sum(-1).amax(0) + 1).all()
    assert of_lmm.tensors["knockout.change"].shape == (4, 4)
    assert of_lmm.tensors["knockout.change"].abs().max() > 50  # the image's way to the question, early


def test_every_part_of_a_vit_leaves_finite_numbers(vit, of_vit) -> None:
    assert "skipped" not in of_vit.header
    for name in of_vit.header["measures"]:
        assert of_vit.tensors[name].shape == (3, 3), name
        assert of_vit.tensors[name].isfinite().all(), name
    assert of_vit.tensors["maps.full"].shape == (3, 3, 25, 25)
    assert of_vit.tensors["rollout.map"].shape == (4, 6)
    full = of_vit.tensors["maps.full"].float()[0]  # (H, 25, 25) of the first image
    entropy = -torch.xlogy(full, full).sum(-1).mean(-1) / math.log(25)
    assert (of_vit.tensors["dormant.row_entropy"] <= 1.0).all()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    alone = analyze_vit(vit, images[:1], what="dormant").tensors["dormant.row_entropy"][0]
    torch.testing.assert_close(alone, entropy, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(of_vit.tensors["distance.mean_pixels"], 16 * of_vit.tensors["distance.mean"])
    assert of_vit.header["grids"] == [[4, 6]] * 3


def test_the_same_again_is_the_same(vit, of_vit) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    again = analyze_vit(vit, images, name="v", patch_size=16)
    assert all(torch.equal(again.tensors[name], value) for name, value in of_vit.tensors.items())
    assert again.header == of_vit.header


def test_parts_alone_are_those_of_the_whole(of_lmm, scenes) -> None:
    alone = analyze_lmm(load_lmm(), scenes, QUESTION, what="sinks, dormant", max_new_tokens=4)
    assert alone.header["what"] == ["sinks", "dormant"]
    assert {name.split(".")[0] for name in alone.tensors} == {"sinks", "dormant"}
    for name, value in alone.tensors.items():
        torch.testing.assert_close(value, of_lmm.tensors[name])


def test_under_a_pruner_the_rest_of_the_image_is_empty(scenes) -> None:
    lmm = load_lmm()
    with lmm.using(FlowCut(keep=10)):
        found = analyze_lmm(lmm, scenes[0], QUESTION, what="visual,sinks,rollout,maps", max_new_tokens=2)
    assert found.header["interventions"][0].startswith("FlowCut")
    rows = found.tensors["maps.image_rows"].float()
    assert rows.shape[-1] == 64
    assert int((rows.sum((0, 1, 2)) > 0).sum()) <= 10
    with lmm.using(RandomPruning(keep=10)):
        analyze_lmm(lmm, scenes[0], QUESTION, what="visual,rollout", max_new_tokens=2)


METHODS = (
    "act:heads=1/2+2/3,threshold=0.02",
    "ad_hh:heads=1/2+2/3,threshold=0.05",
    "air:heads=1/2",
    *("dola", "imbalanced", "ilvad:draft_tokens=3", "pai", "spin:keep_ratio=0.5", "vaf", "var:tau=5,dims=3+7", "vcd"),
    *("vhr", "zerotuning:factors=1/0/3.0+2/1/0.5"),
)
LEFT_OUT = {
    "ilvad": {"sink_dims", "massive", "lens", "importance", "knockout"},
    **{name: {"knockout"} for name in ("act", "ad_hh", "air", "imbalanced", "pai", "spin", "vaf", "var", "zerotuning")},
}
"""Parts that contradict a method: bare forwards where a draft comes first, and another owner of the edited rows."""


@pytest.mark.parametrize("method", METHODS)
def test_under_every_head_method(method: str, scenes) -> None:
    name, lmm = method.partition(":")[0], load_lmm()
    with lmm.using(registry.build("heads", method)):
        found = analyze_lmm(lmm, scenes[0], QUESTION, tau=8.0, rows=16, max_new_tokens=3)
        if name in ("pai", "vhr"):
            with pytest.raises(PlanConflict) if name == "pai" else contextlib.nullcontext():
                analyze_lmm(lmm, scenes[0], QUESTION, what="knockout")
    skipped = set(found.header.get("skipped", {}))
    assert skipped - {"retrieval", "rollout"} == LEFT_OUT.get(name, set())
    assert all(name in found.header["skipped"][part] for part in skipped - {"retrieval", "rollout"})
    assert all(found.tensors[measure].isfinite().all() for measure in found.header["measures"])
    assert {tensor.split(".")[0] for tensor in found.tensors} >= {"visual", "sinks", "dormant", "divergence", "maps"}


def test_every_method_is_analyzed_or_refused(scenes) -> None:
    lmm = load_lmm()
    assert sorted(method.partition(":")[0] for method in METHODS) == sorted(
        set(registry.names("heads")) - {"carve", "opera"}
    )
    with lmm.using(registry.build("heads", "opera")), pytest.raises(PlanConflict, match=r"recorder .* and opera"):
        analyze_lmm(lmm, scenes[0], QUESTION)


def test_files_come_back(of_lmm, tmp_path) -> None:
    tensors, header = of_lmm.save(tmp_path)
    assert tensors.name == "analysis.safetensors"
    described = json.loads(header.read_text())
    assert described["tensors"]["visual.entropy"]["shape"] == [4, 4]
    back = Analysis.load(tmp_path)
    assert back.header == of_lmm.header
    assert back.notes == of_lmm.notes
    for name, value in of_lmm.tensors.items():
        torch.testing.assert_close(back.tensors[name], value, equal_nan=True, rtol=0, atol=0)
    tensors.write_bytes(b"no")
    with pytest.raises(AnnotationError, match="holds no analysis"):
        Analysis.load(tmp_path)


def test_bad_input(scenes, vit) -> None:
    with pytest.raises(UnknownName, match="did you mean 'sinks'"):
        analyze_lmm(load_lmm(), scenes[0], QUESTION, what="sink")
    with pytest.raises(UsageError, match="needs box="):
        analyze_lmm(load_lmm(), scenes[0], QUESTION, what="retrieval")
    with pytest.raises(UsageError, match="no image"):
        analyze_lmm(load_lmm(), [], QUESTION)
    with pytest.raises(UsageError, match=r"expected \(n, 3, H, W\)"):
        analyze_vit(vit, torch.zeros(3, 64, 96))
    with pytest.raises(UsageError, match="names nothing"):
        analyze_vit(vit, torch.zeros(1, 3, 64, 96), what=" ,")
    with pytest.raises(UsageError, match="3 layers take"):
        analyze_vit(vit, torch.zeros(1, 3, 64, 96), what="maps", limit=100)
    with pytest.raises(UsageError, match="added twice"):
        one = Analysis()
        one.add("a", torch.zeros(1), "")
        one.add("a", torch.zeros(1), "")


def test_too_large_maps_leave_the_class_tokens_rows(vit) -> None:
    found = analyze_vit(vit, torch.zeros(1, 3, 64, 96), what="all", limit=100)
    assert "rows of prefix tokens" in found.header["skipped"]["maps"]
    assert found.tensors["maps.prefix_rows"].shape == (3, 3, 1, 25)


def test_stages_of_different_grids(tmp_path) -> None:
    import vislm

    torch.manual_seed(0)
    model = vislm.create_model("nat_mini").eval()
    found = analyze_vit(model, torch.randn(1, 3, 128, 128), what="distance,sinks,patterns,rollout,massive")
    assert set(found.header["skipped"]) == {"patterns", "rollout"}
    assert found.header["heads"][0] == 2
    assert found.tensors["distance.mean"].shape == (18, 16)
    assert found.tensors["distance.mean"][0, 2:].isnan().all()
    assert found.tensors["distance.mean"][-1].isfinite().all()
    write_report(found, Image.new("RGB", (128, 128)), tmp_path)


def test_padding_of_ragged_layers() -> None:
    stacked = padded_stack({1: torch.ones(2, 1), 2: torch.zeros(1, 3)}, 4)
    assert stacked.shape == (4, 2, 3)
    assert int(stacked.isfinite().sum()) == 5
    with pytest.raises(UsageError, match="nothing"):
        padded_stack({})


# -- pictures and page -------------------------------------------------------------------------------------------------
def page_of(analysis: Analysis, picture: Image.Image, folder) -> str:
    paths = write_report(analysis, picture, folder, footer="<img src=x onerror=alert(1)>")
    for path in paths[1:]:
        with Image.open(path) as image:
            assert min(image.size) > 100, path
    return paths[0].read_text(encoding="utf-8")


def test_the_page_stands_alone_and_escapes_all_text(of_lmm, scenes, tmp_path) -> None:
    hostile = "</script><script>alert(1)</script>"
    header = {
        **of_lmm.header,
        "question": hostile,
        "tokens": [hostile, "b", "c"],
        "answers": [hostile],
        "model": hostile,
    }
    changed = Analysis(header, of_lmm.tensors, {**of_lmm.notes, "visual.entropy": hostile})
    page = page_of(changed, scenes[0], tmp_path)
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page
    assert "onerror=alert" not in page.replace("&lt;img src=x onerror=alert", "")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in re.sub(r"http-equiv", "", page)
    (wanted,) = re.findall(r"script-src 'sha256-([^']+)'", page)
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == wanted


def test_the_page_holds_the_maps(of_lmm, of_vit, scenes, tmp_path) -> None:
    for analysis, shape in ((of_lmm, (3, 4, 4, 64)), (of_vit, (25, 3, 3, 24))):
        maps = explorer_data(analysis, scenes[0])["maps"]
        data = torch.frombuffer(bytearray(base64.b64decode(maps["data"])), dtype=torch.uint8).view(shape)
        scale = torch.frombuffer(bytearray(base64.b64decode(maps["scale"])), dtype=torch.float32).view(shape[:3])
        found = data.float() / 255 * scale[..., None]
        if analysis is of_lmm:
            expected = of_lmm.tensors["maps.image_rows"].float()
        else:
            expected = of_vit.tensors["maps.full"].float().permute(2, 0, 1, 3)[..., 1:]
        assert ((found - expected).abs() <= scale[..., None] / 255).all()
    page_of(of_vit, scenes[0], tmp_path)


def test_maps_that_exceed_the_page_are_thinned(of_vit, scenes) -> None:
    each = 3 * 3 * 24
    maps = explorer_data(of_vit, scenes[0], limit=7 * each)["maps"]
    assert [query.get("cell") for query in maps["queries"]] == [None, 0, 4, 8, 12, 16, 20]
    assert len(explorer_data(of_vit, scenes[0], limit=1)["maps"]["queries"]) == 1


def test_small_helpers(of_vit, tmp_path) -> None:
    assert json.loads(script_safe({"a": "</script>&\u2028"})) == {"a": "</script>&\u2028"}
    assert "<" not in script_safe("<!--")
    import numpy as np

    assert colour_range(np.array([0.0, 0.0])) == (0.0, 1.0, False)
    assert colour_range(np.array([-1.0, 3.0])) == (-3.0, 3.0, True)
    assert colour_range(np.array([np.nan, 7.0, 8.0]))[:2] == (7.0, 8.0)
    assert [short(x) for x in (0.0, 0.00123, 0.5, 12.345, 123456.0)] == ["0", "1.2e-3", "0.5", "12.3", "1.2e5"]
    with pytest.raises(UsageError, match=r"named nothing\.\.\."):
        head_sheet(of_vit, tmp_path / "x.png", "nothing")


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture
def command(monkeypatch):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(analyze)

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["analyze", *map(str, arguments)])
        app(standalone_mode=False)

    return call


def test_the_command_on_the_embedded_model(command, scenes, tmp_path) -> None:
    scenes[0].save(tmp_path / "s.png")
    parts = "visual,sinks,lens,maps"
    command("-i", tmp_path / "s.png", "-q", QUESTION, "--what", parts, "-o", tmp_path / "o", "--heads", "vhr:alpha=2")
    found = Analysis.load(tmp_path / "o")
    assert found.header["interventions"][0].startswith("VHR")
    assert {"index.html", "heads.png", "overlays.png", "curves.png"} <= {p.name for p in (tmp_path / "o").iterdir()}


def test_the_command_on_backbones(command, scenes, tmp_path) -> None:
    scenes[0].resize((90, 60)).save(tmp_path / "s.png")
    what = ("--what", "distance,patterns,maps", "-i", tmp_path / "s.png", "-o", tmp_path / "o")
    command("--model", "vit_tiny_patch16_224", "--size", "32x64", *what)
    found = Analysis.load(tmp_path / "o")
    assert found.header["grids"][0] == [2, 4]
    assert found.header["weights"] == "random, seed 0"
    assert "Untrained weights" in (tmp_path / "o" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vislm-tiny", "--label", 3], "for ViTs"),
        (["--model", "vit_tiny_patch16_224", "--prune", "flowcut:keep=3"], "for LMMs"),
        (["--model", "vit_tinny_patch16_224"], "did you mean"),
        (["--box", "1,2"], "LEFT,TOP,RIGHT,BOTTOM"),
        (["--model", "open_clip:ViT-Q"], "model of open_clip"),
        (["--model", "vit_tiny_patch16_224", "--label", 1, "--label", 2], "2 labels for 1 images"),
    ],
)
def test_wrong_arguments(command, scenes, tmp_path, arguments, message) -> None:
    scenes[0].save(tmp_path / "s.png")
    with pytest.raises(UsageError, match=message):
        command("-i", tmp_path / "s.png", "-o", tmp_path / "o", *arguments)
