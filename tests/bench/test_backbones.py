"""The benchmark of backbones: what it compares, how it counts, what it says of the figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from vislm.backbones import list_models
from vislm.bench.backbones import run
from vislm.bench.backbones.blocks import BlockRow, block_call, our_blocks, swin_blocks
from vislm.bench.backbones.calls import model_call
from vislm.bench.backbones.memory import peak_memory
from vislm.bench.backbones.models import DEIT_S, PEERS, Model, Pair, growth_is_linear, pairs_of
from vislm.bench.backbones.rows import Figures, Row, batch_at, growth, table_row
from vislm.bench.backbones.run import Bench, backbone_lines
from vislm.bench.backbones.verdicts import growths, verdicts
from vislm.errors import UnknownName, UsageError


def row(name: str, peer: str, size: int, ours: float, theirs: float, peaks=(10, 20)) -> Row:
    pair = Pair(Model(name), Model(peer, "timm"))
    mine, other = (
        Figures(seconds, seconds, 1 / seconds, peak) for seconds, peak in zip((ours, theirs), peaks, strict=True)
    )
    return Row(pair, size, 1, mine, other)


@pytest.mark.parametrize("exponent", [0.8, 1.0, 2.0])
def test_growth_is_the_exponent_of_time_over_pixels(exponent) -> None:
    points = [(size, 3e-4 * size ** (2 * exponent)) for size in (224, 448, 896)]
    assert growth(points) == pytest.approx(exponent)
    assert growth(points[-2:]) == pytest.approx(exponent)
    assert growth(points[:1]) is None
    assert growth([]) is None


def test_growths_come_from_the_two_largest_sizes() -> None:
    rows = [row("nat_tiny", DEIT_S, 224, 9.0, 1.0), row("nat_tiny", DEIT_S, 448, 1.0, 1.0)]
    rows += [row("nat_tiny", DEIT_S, 896, 4.0, 16.0), row("nat_tiny", "resnet18", 896, 5.0, 1.0)]
    found = growths(rows)
    assert found == {"vislm/nat_tiny": pytest.approx(1.0), f"timm/{DEIT_S}": pytest.approx(2.0)}


def test_batches_keep_the_number_of_pixels() -> None:
    assert [batch_at(size, 8) for size in (112, 224, 448, 896)] == [32, 8, 2, 1]


def test_every_usual_pair_exists() -> None:
    pairs = pairs_of(PEERS)
    assert {pair.ours.name for pair in pairs} == set(PEERS) <= set(list_models())
    assert all(pair.peer.library == "timm" for pair in pairs)
    assert {pair.ours.name for pair in pairs if pair.peer.name == DEIT_S} >= {"nat_tiny", "stvit_small"}
    assert pairs_of(["nat_mini:resnet18"]) == [Pair(Model("nat_mini"), Model("resnet18", "timm"))]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["nat_tinny"], UnknownName, "nat_tiny"),
        (["nat_tiny:resnet51"], UnknownName, "resnet50"),
        (["nat_base"], UsageError, "no usual peer"),
        ([], UsageError, "nothing|no models"),
    ],
)
def test_names_that_do_not_exist(names, error, message) -> None:
    with pytest.raises(error, match=message):
        Bench(models=names).groups()


@pytest.mark.parametrize("wrong", [{"sizes": []}, {"batch": 0}, {"threads": 0}, {"repeats": 0}, {"sizes": [0]}])
def test_numbers_that_do_not_fit(wrong) -> None:
    with pytest.raises(UsageError, match="expected at least one size"):
        Bench(**wrong).groups()


def test_pairs_with_one_peer_take_turns() -> None:
    groups = Bench(models=["nat_tiny", "stvit_small", "nat_tiny"]).groups()
    assert all(len({pair.peer for pair in group}) == 1 for group in groups)
    assert len([pair for group in groups for pair in group]) == 4  # each once


def test_sizes_that_the_peer_takes() -> None:
    (halo,) = pairs_of(["halonet_h4"])
    assert [halo.size(size) for size in (224, 448, 896)] == [256, 512, 1024]
    assert pairs_of(["nat_mini"])[0].size(224) == 224


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", DEIT_S])
def test_peers_of_one_size_are_built_for_it(name) -> None:
    with torch.device("meta"):
        model = Model(name, "timm").build(448)
    assert tuple(model.get_submodule("patch_embed").img_size) == (448, 448)


def test_which_growth_should_be_linear() -> None:
    assert growth_is_linear("nat_tiny")
    assert growth_is_linear("agent_deit_small")
    assert not growth_is_linear("agent_deit_base")  # all tokens attend in most of its blocks
    assert not growth_is_linear("stvit_small")


def test_table_row_has_ratios_of_ours_over_the_peer() -> None:
    cells = table_row(row("nat_tiny", "swin_tiny_patch4_window7_224", 896, 0.5, 2.0, peaks=(30 << 20, 20 << 20)))
    assert cells["timm's"] == "swin_tiny"
    assert cells["ms"] == "500"
    assert (cells["time x"], cells["img/s x"], cells["memory x"]) == ("0.25", "4.00", "1.50")
    unknown = table_row(row("nat_tiny", DEIT_S, 896, 0.5, 2.0, peaks=(None, None)))
    assert (unknown["peak"], unknown["memory x"]) == ("-", "-")


def test_verdicts() -> None:
    rows = [row("nat_tiny", DEIT_S, 448, 1.0, 1.0), row("nat_tiny", DEIT_S, 896, 4.2, 9.0)]
    rows += [row("agent_deit_small", DEIT_S, 448, 1.0, 1.0), row("agent_deit_small", DEIT_S, 896, 6.0, 9.0, (20, 10))]
    rows += [row("stvit_small", DEIT_S, 448, 1.0, 1.0), row("stvit_small", DEIT_S, 896, 9.5, 9.0, (None, None))]
    blocks = [BlockRow("swin_tiny", 96, 56, 1, training, 1.0 + training, 1.0) for training in (False, True)]
    found = {(verdict.claim[:5], verdict.about): verdict for verdict in verdicts(rows, blocks)}
    assert {key: verdict.holds for key, verdict in found.items()} == {
        ("time ", "nat_tiny"): True,
        ("time ", "agent_deit_small"): False,
        ("beats", "nat_tiny"): True,
        ("beats", "agent_deit_small"): False,  # in time only
        ("beats", "stvit_small"): False,
        ("block", "neighborhood, forward"): True,
        ("block", "neighborhood, forward + backward"): False,
    }
    assert "^ 1.04" in found["time ", "nat_tiny"].figures
    assert found["beats", "agent_deit_small"].figures == "time x 0.67, memory x 2.00"
    assert verdicts([], []) == []


def test_calls_of_a_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    assert not model_call(model, (2, 3, 4, 4), training=False)().requires_grad
    assert not model.training
    reached = []
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: reached.append(1))
    model_call(model, (2, 3, 4, 4), training=True)()
    assert (model.training, reached) == (True, [1])
    assert model[1].weight.grad is None


def test_blocks_of_equal_width_have_about_as_many_parameters() -> None:
    tokens = torch.randn(1, 14 * 14, 64, generator=torch.Generator().manual_seed(0))
    for blocks in (our_blocks(64, 14), swin_blocks(64, 14)):
        with torch.no_grad():
            assert blocks(tokens).shape == tokens.shape
        block_call(blocks, tokens, training=True)()


def test_lines_and_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "measure_blocks", lambda *_: iter([BlockRow("swin_tiny", 96, 56, 1, False, 1.0, 2.0)]))
    bench = Bench(["van_b0:resnet10t"], (32, 64), batch=1, repeats=1, threads=1, memory=False)
    lines = list(backbone_lines(bench, tmp_path / "figures.json"))
    text = "\n".join(lines)
    assert all(word in text for word in ("van_b0", "resnet10t", "exponent", "claim", "not slower", "written"))
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [row["size"] for row in content["rows"]] == [32, 64]
    assert all(row["time_ratio"] > 0 and row["ours"]["peak"] is None for row in content["rows"])
    assert set(content["growth"]) == {"vislm/van_b0", "timm/resnet10t"}
    assert {verdict["about"] for verdict in content["verdicts"]} == {"van_b0", "neighborhood, forward"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peaks_of_a_model() -> None:
    peaks = peak_memory(Model("resnet10t", "timm"), [64, 32, 64], False, 1)
    assert set(peaks) == {32, 64}
    assert 0 < peaks[64] < 100 << 20
