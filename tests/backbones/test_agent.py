"""Agent Attention's backbones: which block is what, and the authors' parameter names."""

from __future__ import annotations

import re

import pytest
import torch

from vislm.backbones import create_model, from_official
from vislm.errors import CheckpointError

KINDS = {"AgentAttention": "A", "AgentCswinAttention": "A", "WindowAttention": "w", "DenseAttention": "d"}


def layout(name: str) -> list[str]:
    with torch.device("meta"):
        model = create_model(name)
    stages = [model.blocks] if name.startswith("agent_deit") else [stage.blocks for stage in model.stages]
    return ["".join(kind(block.attn) for block in blocks) for blocks in stages]


def kind(attention) -> str:
    letter = KINDS.get(type(attention).__name__, "c")
    if letter == "c":
        return "c" if attention.split_size else "f"
    return "s" if getattr(attention, "shifted", False) else letter


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("agent_deit_small", ["A" * 12]),
        ("agent_deit_base", ["AAAA" + "d" * 8]),
        ("agent_pvt_tiny", ["AA"] * 4),
        ("agent_swin_tiny", ["AA", "AA", "AAAAAA", "ws"]),
        ("agent_swin_small", ["AA", "AA", "ws" * 9, "ws"]),
        ("agent_swin_base", ["AA", "AA", "AA" + "ws" * 8, "ws"]),
        ("agent_cswin_tiny", ["AA", "AAAA", "c" * 18, "f"]),
    ],
)
def test_blocks(name, blocks) -> None:
    assert layout(name) == blocks


def test_fine_tuned_at_a_higher_resolution() -> None:
    with torch.device("meta"):
        swin, cswin = create_model("agent_swin_base_384"), create_model("agent_cswin_base_384")
    assert swin.stages[0].blocks[0].attn.ah_bias.shape == (1, 4, 9, 96, 1)
    assert swin.stages[2].blocks[2].attn.window_size == (12, 12)
    assert cswin.stages[2].blocks[0].attn.split_size == 12


def tiny_stages(depth: int = 2) -> list[dict[str, object]]:
    blocks = {"blocks": [{"name": "agent", "agent_num": 4, "table_size": 8}, {"name": "window", "window_size": 2}]}
    return [{"dim": 8, "depth": depth, "num_heads": 2, **blocks}, {"dim": 16, "depth": 1, "num_heads": 2, **blocks}]


def small_model(family: str, tiny: dict[str, object]):
    torch.manual_seed(0)
    return create_model(f"agent_{family}_tiny", **tiny).eval()


SWIN = {"stages": tiny_stages(), "num_classes": 3}
PVT_BLOCK = [{"name": "agent", "separate_kv": True, "agent_num": 4, "table_size": 8}]
PVT = {
    "stages": [
        {"dim": 8, "depth": 2, "num_heads": 2, "blocks": PVT_BLOCK, "ffn": {"ratio": 2}, "pos_embed": 8},
        {"dim": 16, "depth": 1, "num_heads": 2, "blocks": PVT_BLOCK, "pos_embed": 4},
    ],
    "num_classes": 3,
}
CSWIN = {
    "stages": [
        {"dim": 8, "depth": 1, "num_heads": 2, "blocks": [{"name": "agent_cswin", "agent_num": 4, "table_size": 8}]},
        {"dim": 16, "depth": 2, "num_heads": 2, "blocks": [{"split_size": 2}]},
        {"dim": 32, "depth": 1, "num_heads": 2, "blocks": [{"split_size": None}]},
    ],
    "num_classes": 3,
}
DEIT = {"dim": 8, "num_heads": 2, "depth": 2, "pos_embed": 2, "num_classes": 3}


def swin_names(name: str) -> str:
    name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return name.replace("stages.", "layers.").replace("stem.", "patch_embed.").replace("head.fc.", "head.")


def pvt_names(name: str) -> str:
    name = name.replace("stem.", "patch_embed1.").replace("head.fc.", "head.")
    name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", name)
    name = re.sub(r"^stages\.(\d+)\.pos_embed", lambda m: f"pos_embed{int(m[1]) + 1}", name)
    return re.sub(r"^stages\.(\d+)\.blocks", lambda m: f"block{int(m[1]) + 1}", name)


def cswin_names(name: str) -> str:
    name = name.replace("stem.proj.", "stage1_conv_embed.0.").replace("stem.norm.", "stage1_conv_embed.2.")
    name = re.sub(r"^stages\.(\d+)\.downsample\.proj", r"merge\1.conv", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.norm", r"merge\1.norm", name)
    name = re.sub(r"^stages\.(\d+)\.blocks", lambda m: f"stage{int(m[1]) + 1}", name)
    return name.replace(".attn.", ".").replace(".dwc.", ".get_v.").replace("head.fc.", "head.")


def deit_names(name: str) -> str:
    return name.replace("stem.", "patch_embed.").replace("head.fc.", "head.")


@pytest.mark.parametrize(
    ("family", "sizes", "names"),
    [("swin", SWIN, swin_names), ("pvt", PVT, pvt_names), ("cswin", CSWIN, cswin_names), ("deit", DEIT, deit_names)],
)
def test_official_checkpoints_load(family, sizes, names) -> None:
    model = small_model(family, sizes)
    state = {names(name): tensor for name, tensor in model.state_dict().items()}
    assert len(set(state) & set(model.state_dict())) < len(state)
    if family == "swin":
        state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    loaded = from_official(f"agent_{family}_tiny", {"model": state}, **sizes)
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(loaded(images), model(images))


def test_names_that_do_not_fit_are_told() -> None:
    state = {deit_names(name): tensor for name, tensor in small_model("deit", DEIT).state_dict().items()}
    state["blocks.0.attn.na_bais"] = state.pop("blocks.0.attn.na_bias")
    with pytest.raises(CheckpointError, match=r"near to blocks\.0\.attn\.na_bais"):
        from_official("agent_deit_tiny", state, **DEIT)


def test_tables_take_no_weight_decay() -> None:
    names = small_model("pvt", PVT).no_weight_decay()
    assert {"stages.0.pos_embed", "stages.1.pos_embed", "stages.0.blocks.1.attn.ha_bias"} <= names
    assert not any(name.endswith(("weight", ".bias")) for name in names)
