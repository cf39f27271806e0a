"""``vislm list backbones`` and ``vislm info`` of a backbone."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from vislm.backbones import list_models
from vislm.cli import app


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_all_backbones_are_listed_with_their_figures() -> None:
    lines = run("list", "backbones").splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert set(list_models()) <= set(rows)
    assert re.search(r"27\.9 M parameters, 4\.3 GMACs, top-1 83\.2 % at 224", rows["nat_tiny"])
    assert "neighborhood" in run("list", "attentions")


@pytest.mark.slow
def test_a_backbone_is_described_and_measured() -> None:
    text = run("info", "nat_mini", "--size", "64x96")
    assert "nat_mini: Hierarchical, 19,984,174 parameters" in text
    assert "top-1 81.8 % on ImageNet-1k, 2.7 G multiply-adds at 224 x 224 (arXiv 2204.07143" in text
    assert "64 wide at 1/4, 128 wide at 1/8, 256 wide at 1/16, 512 wide at 1/32" in text
    assert re.search(r"at 64 x 96: 0\.\d+ G multiply-adds", text)
    assert re.search(r"measured: [\d.]+ ms, .* \(1 image, float32, cpu, \d+ threads\)", text)
    assert "64 x 96" in text.splitlines()[-1]
