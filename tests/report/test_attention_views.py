"""The weights that are drawn are the layer's own: they give its output back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from vislm.attention import attention_class
from vislm.attention.tokens import split_heads
from vislm.errors import UsageError
from vislm.report.attention_views import VIEWS, Layer, panels_of
from vislm.report.attention_views.agents import agent_cells, agent_maps
from vislm.report.attention_views.dense import dense_row, lepe_row, sigmoid_row
from vislm.report.attention_views.gate import gate_field, gate_kernel, gate_map
from vislm.report.attention_views.halo import halo_row
from vislm.report.attention_views.merged_tokens import merged_row, merged_tokens
from vislm.report.attention_views.neighborhood import neighborhood_row
from vislm.report.attention_views.panel import tiles
from vislm.report.attention_views.routed_heads import aggregated_rows, cosine_row, moh_row
from vislm.report.attention_views.rows import Row, head_panels
from vislm.report.attention_views.significance import hybrid_rows
from vislm.report.attention_views.stripes import stripe_rows
from vislm.report.attention_views.super_tokens import super_token_maps
from vislm.report.attention_views.window import window_row

DIM = 16


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer(name: str, grid: tuple[int, int], prefix: int = 0, **options) -> Layer:
    if prefix:
        options["num_prefix_tokens"] = prefix
    attention = attention_class(name)(dim=DIM, num_heads=4, **options).eval().requires_grad_(False)
    for parameter in attention.parameters():  # biases of zero would hide mistakes
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    return Layer(attention, torch.randn(1, prefix + math.prod(grid), DIM), grid)


def silence(*convolutions: nn.Conv2d) -> None:
    """Switch off what an attention adds to its heads."""
    for convolution in convolutions:
        convolution.weight.zero_()
        if convolution.bias is not None:
            convolution.bias.zero_()


def flat(weights: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.nan_to_num(weights)).flatten(1)


def values(seen: Layer) -> torch.Tensor:
    """Return the values ``(H, h w, D)`` of the grid's tokens."""
    value = seen.attention.qkv(seen.x).chunk(3, dim=-1)[2]
    return split_heads(value, seen.attention.num_heads)[0, :, seen.num_prefix :]


def heads_of(seen: Layer, weights: np.ndarray) -> torch.Tensor:
    return torch.einsum("hn,hnd->hd", flat(weights), values(seen)).flatten()


def output(seen: Layer, place: tuple[int, int], *given) -> torch.Tensor:
    return seen.attention(seen.x, seen.grid, *given)[0, seen.token(place)]


@pytest.mark.parametrize(
    ("name", "grid", "options", "row"),
    [
        ("dense", (3, 5), {}, dense_row),
        ("window", (6, 9), {"window_size": 3}, window_row),
        ("window", (6, 9), {"window_size": 3, "shifted": True}, window_row),
        ("neighborhood", (7, 9), {"window_size": 3, "dilation": 2, "rel_pos_bias": True}, neighborhood_row),
        ("neighborhood", (7, 9), {"window_size": 3, "stride": 2, "border": "mask"}, neighborhood_row),
    ],
)
def test_weights_give_the_output_back(name, grid, options, row) -> None:
    seen = layer(name, grid, **options)
    for place in ((0, 0), (2, 4), (grid[0] - 1, grid[1] - 2)):
        drawn = row(seen, place)
        assert drawn.weights.shape == (4, *grid)
        assert np.nansum(drawn.weights, axis=(1, 2)) == pytest.approx(1)
        torch.testing.assert_close(seen.attention.proj(heads_of(seen, drawn.weights)), output(seen, place))


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_padded_grids(shifted) -> None:
    """Zero tokens take part: what they get is counted apart, and their values are the bias."""
    seen = layer("window", (5, 7), window_size=4, shifted=shifted)
    padding = split_heads(seen.attention.qkv.bias[None, None].chunk(3, dim=-1)[2], 4)[0, :, 0]
    for place in ((0, 0), (1, 6), (4, 3)):
        row = window_row(seen, place)
        assert np.nansum(row.weights, axis=(1, 2)) + row.beside == pytest.approx(1)
        mixed = heads_of(seen, row.weights) + (torch.from_numpy(row.beside)[:, None] * padding).flatten()
        torch.testing.assert_close(seen.attention.proj(mixed), output(seen, place))


@pytest.mark.parametrize(("grid", "place"), [((4, 9), (2, 7)), ((9, 3), (7, 1))])
def test_neighborhoods_of_small_grids(grid, place) -> None:
    seen = layer("neighborhood", grid, window_size=5, small_input="pad", rel_pos_bias=True)
    padding = split_heads(seen.attention.qkv.bias[None, None].chunk(3, dim=-1)[2], 4)[0, :, 0]
    row = neighborhood_row(seen, place)
    mixed = heads_of(seen, row.weights) + (torch.from_numpy(row.beside)[:, None] * padding).flatten()
    torch.testing.assert_close(seen.attention.proj(mixed), output(seen, place))


@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("dense", {}, dense_row),
        ("window", {"window_size": 3}, window_row),
        ("neighborhood", {"window_size": 3}, neighborhood_row),
        ("lepe", {}, lepe_row),
        ("moh", {}, moh_row),
        ("moh_cosine", {}, cosine_row),
    ],
)
def test_prefix_tokens_are_counted_apart(name, options, row) -> None:
    drawn = row(layer(name, (6, 6), prefix=2, **options), (4, 1))
    assert (drawn.beside > 0).all()
    assert np.nansum(drawn.weights, axis=(1, 2)) + drawn.beside == pytest.approx(1)


def test_sigmoid() -> None:
    seen = layer("sigmoid", (3, 4), n_train=12)
    drawn = sigmoid_row(seen, (1, 2)).weights
    torch.testing.assert_close(seen.attention.proj(heads_of(seen, drawn)), output(seen, (1, 2)))


def test_lepe() -> None:
    seen = layer("lepe", (3, 4))
    silence(seen.attention.lepe_conv)
    value = split_heads(seen.attention.kv(seen.x).chunk(2, dim=-1)[1], 4)[0]
    mixed = torch.einsum("hn,hnd->hd", flat(lepe_row(seen, (1, 2)).weights), value).flatten()
    torch.testing.assert_close(seen.attention.proj(mixed), output(seen, (1, 2)))


@pytest.mark.parametrize("options", [{}, {"mask_padding": True}, {"stride": 2}], ids=str)
def test_halo(options) -> None:
    seen = layer("halo", (6, 9), block_size=4, halo_size=2, **options)
    _, _, value, _ = seen.attention.operands(seen.x, seen.grid)
    value = value.unflatten(2, (8, 12))[0, :, :6, :9].flatten(1, 2)
    stride = seen.attention.query_stride
    whole = seen.attention(seen.x, seen.grid)[0].unflatten(0, seen.attention.out_grid(seen.grid))
    for place in ((0, 0), (5, 7), (4, 8)):
        row = halo_row(seen, place)
        mixed = torch.einsum("hn,hnd->hd", flat(row.weights), value).flatten()
        torch.testing.assert_close(mixed, whole[place[0] // stride, place[1] // stride])
    inner = np.isfinite(halo_row(seen, (1, 5)).weights[0])
    assert inner.sum() == 6 * 7  # rows 0 to 5 and columns 2 to 8: the block, its halo, cut by the grid


def test_stripes() -> None:
    seen = layer("cswin", (5, 8), split_size=3)
    silence(*(branch.dwc for branch in seen.attention.attns))
    rows = stripe_rows(seen, (3, 4))
    assert [np.isfinite(row.weights[0]).sum() for row in rows] == [5 * 3, 2 * 8]
    both = np.concatenate([row.weights for row in rows])
    torch.testing.assert_close(seen.attention.proj(heads_of(seen, both)), output(seen, (3, 4)))


@pytest.mark.parametrize(("prefix", "sr"), [(0, 1), (1, 1), (0, 2)])
def test_agents(prefix, sr) -> None:
    options = {"separate_kv": True, "sr_ratio": sr} if sr > 1 else {}
    seen = layer("agent", (6, 8), prefix, agent_num=4, table_size=4, **options)
    silence(seen.attention.dwc)
    maps = agent_maps(seen, (2, 5))
    assert maps.shares.shape == (4, 2, 2)
    assert maps.gathered.shape == (4, 2, 2, 6, 8)
    assert maps.shares.sum(axis=(1, 2)) == pytest.approx(1)
    composed = np.einsum("hab,habrc->hrc", maps.shares, maps.gathered)
    assert composed == pytest.approx(maps.row.weights)
    _, _, value = seen.attention.projected(seen.x, seen.grid)
    weights = maps.row.weights[:, ::sr, ::sr]
    mixed = torch.einsum("hn,hnd->hd", flat(weights), split_heads(value, 4)[0, :, prefix:])
    if prefix:
        assert weights.sum(axis=(1, 2)) + maps.row.beside == pytest.approx(1)
        mixed = mixed + torch.from_numpy(maps.row.beside)[:, None] * split_heads(value, 4)[0, :, 0]
    torch.testing.assert_close(seen.attention.proj(mixed.flatten()), output(seen, (2, 5)))


def test_agents_in_stripes_have_no_picture() -> None:
    seen = layer("agent_cswin", (6, 6), agent_num=4, table_size=6)
    assert agent_maps(seen, (1, 1)).shares.shape == (4, 2, 2)
    with pytest.raises(UsageError, match="stripes with agents of their own"):
        agent_maps(layer("agent_cswin", (6, 6), agent_num=4, table_size=6, split_size=2), (1, 1))


def test_agent_cells() -> None:
    assert agent_cells((4, 5), (2, 2)).tolist() == [[0, 0, 0, 1, 1]] * 2 + [[2, 2, 2, 3, 3]] * 2


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_super_tokens_read_directly(grid) -> None:
    """Without refinement the output is the weights times the tokens themselves."""
    seen = layer("super_token", grid, stoken_size=4, n_iter=2, refine="none")
    maps = super_token_maps(seen, (5, 6))
    assert maps.row is not None
    torch.testing.assert_close(flat(maps.row.weights)[0] @ seen.x[0], output(seen, (5, 6)))
    assert (maps.tessellation == seen.attention.tessellation(seen.x, grid)[0].numpy()).all()


def test_super_tokens_refined_by_attention() -> None:
    seen = layer("super_token", (8, 12), prefix=1, stoken_size=4)
    attention, refine, maps = seen.attention, seen.attention.stoken_refine, super_token_maps(seen, (5, 6))
    tokens = torch.cat((seen.x[:, :1], attention.sample(seen.x, seen.grid).tokens), dim=1)
    value = refine.qkv(tokens).unflatten(-1, (4, 3, -1)).transpose(1, 2).unbind(3)[2][0]
    assert maps.refined is not None
    assert maps.row is not None
    whole = np.concatenate((maps.row.beside[:, None], maps.refined), axis=1)
    mixed = torch.einsum("hm,hmd->hd", torch.from_numpy(whole), value).flatten()
    weight, bias = refine.proj.weight.flatten(1), refine.proj.bias
    torch.testing.assert_close(weight @ mixed + bias * maps.association.sum(), output(seen, (5, 6)))
    assert maps.row.weights.sum(axis=(1, 2)) == pytest.approx(maps.refined.sum(axis=1))


def test_super_tokens_of_one_patch_are_dense_attention() -> None:
    seen = layer("super_token", (3, 4), stoken_size=1)
    first, mean, _ = panels_of(seen, (1, 2))
    assert first.values is None
    assert mean.values is not None
    assert mean.values.sum() == pytest.approx(100)


def test_hybrid_scale() -> None:
    seen = layer("hybrid_scale", (7, 9), sr_ratio=3, window_size=4)
    attention, half = seen.attention, 2
    silence(attention.lepe_conv)
    coarse, local = hybrid_rows(seen, (5, 2))
    assert np.isnan(coarse.weights[:, 6]).all()  # left over at the lower border
    assert np.isfinite(local.weights[0]).sum() == 3 * 4
    scales = attention.scales(seen.x, seen.grid)
    parts = [
        torch.einsum("hn,hnd->hd", flat(weights), scale.value[0])
        for weights, scale in ((coarse.weights[:, :6:3, ::3], scales[0]), (local.weights, scales[1]))
    ]
    assert len(parts[0]) == half
    torch.testing.assert_close(attention.proj(torch.cat(parts).flatten()), output(seen, (5, 2)))


def test_self_guided() -> None:
    seen = layer("self_guided", (8, 10), sr_ratio=4)
    seen = Layer(seen.attention, seen.x, seen.grid, torch.rand(1, 80))
    silence(seen.attention.lepe_conv)
    merged, row = merged_tokens(seen), merged_row(seen, (5, 2))
    tokens = seen.attention.merged(seen.x, seen.significance)
    assert merged.key.max() + 1 == tokens.shape[1]
    assert merged.lengths == [49, 14, 7]
    value = torch.cat([kv(tokens).chunk(2, dim=-1)[1] for kv in (seen.attention.kv1, seen.attention.kv2)], dim=-1)
    first = [int(np.flatnonzero(merged.key.ravel() == key)[0]) for key in range(tokens.shape[1])]
    mixed = torch.einsum("hn,hnd->hd", flat(row.weights)[:, first], split_heads(value, 4)[0]).flatten()
    torch.testing.assert_close(seen.attention.proj(mixed), output(seen, (5, 2), seen.significance))


def test_self_guided_merges_the_least_significant_most() -> None:
    seen = layer("self_guided", (8, 10), sr_ratio=4)
    rating = torch.arange(80.0)[None]
    merged = merged_tokens(Layer(seen.attention, seen.x, seen.grid, rating))
    assert merged.part.ravel().tolist() == [0] * 20 + [1] * 40 + [2] * 20
    runs = np.bincount(merged.key.ravel()).tolist()
    assert runs == [20, *[14] * 2, 12, *[7] * 2, 6]  # runs of up to 49, 14 and 7 patches
    with pytest.raises(UsageError, match="no significance"):
        merged_tokens(seen)


@pytest.mark.parametrize(("name", "row"), [("moh", moh_row), ("moh_cosine", cosine_row)])
def test_mixture_of_heads(name, row) -> None:
    seen = layer(name, (4, 6), shared_heads=1, routed_heads=2)
    gate = seen.attention.router(seen.x).gate[0, seen.token((3, 2))]
    mixed = heads_of(seen, row(seen, (3, 2)).weights).unflatten(0, (4, -1)) * gate[:, None]
    torch.testing.assert_close(seen.attention.proj(mixed.flatten()), output(seen, (3, 2)))


@pytest.mark.parametrize("prefix", [0, 1])
def test_window_and_pooled_map_in_one_softmax(prefix) -> None:
    seen = layer("moh_aggregated", (6, 9), prefix, shared_heads=1, routed_heads=2, sr_ratio=3)
    attention, index = seen.attention, seen.token((4, 7))
    attention.learnable_tokens.zero_()
    attention.learnable_bias.zero_()
    window, far = aggregated_rows(seen, (4, 7))
    pooled = far.weights[:, ::3, ::3]
    assert np.nansum(window.weights, axis=(1, 2)) + window.beside + pooled.sum(axis=(1, 2)) == pytest.approx(1)
    keys = attention.keys_values(seen.x)[1][0]
    patches = nn.functional.gelu(attention.sr(seen.x[:, prefix:].transpose(1, 2).unflatten(2, (6, 9))))
    coarse = attention.norm(nn.functional.adaptive_avg_pool2d(patches, (2, 3)).flatten(2).transpose(1, 2))
    mixed = torch.einsum("hn,hnd->hd", flat(window.weights), keys[:, prefix:])
    mixed += torch.einsum("hn,hnd->hd", flat(pooled), attention.keys_values(coarse)[1][0])
    if prefix:
        mixed += torch.from_numpy(window.beside)[:, None] * keys[:, 0]
    gate = attention.router(seen.x).gate[0, index]
    torch.testing.assert_close(attention.proj((mixed * gate[:, None]).flatten()), output(seen, (4, 7)))


def test_the_gate_and_its_kernel() -> None:
    seen = layer("large_kernel", (9, 12), kernel_size=6, dilation=2)
    gate = seen.attention.spatial_gating_unit
    inner = nn.functional.gelu(seen.attention.proj_1(seen.x)).transpose(1, 2).unflatten(2, seen.grid)

    def at_query(x: torch.Tensor) -> torch.Tensor:
        return gate.conv1(gate.conv_spatial(gate.conv0(x)))[0, :, 2, 5]

    jacobian = torch.autograd.functional.jacobian(at_query, inner)[:, 0]
    norm = jacobian.square().sum(dim=(0, 1)).sqrt().numpy()
    field = gate_field(seen, (2, 5))
    assert ((norm > 0) == field).all()
    assert gate_kernel(seen, (2, 5))[field] == pytest.approx(norm[field])
    assert gate_map(seen)[2, 5] == pytest.approx(float(at_query(inner).square().mean().sqrt()))


@pytest.mark.parametrize("shifted", [False, True])
def test_the_frame_is_one_of_the_windows(shifted) -> None:
    first, *others = panels_of(layer("window", (7, 9), window_size=4, shifted=shifted), (4, 2))
    assert first.regions is not None
    assert first.frame is not None
    assert (first.frame == (first.regions == first.regions[4, 2])).all()
    assert others[0].values is not None
    assert (np.isfinite(others[0].values) == first.frame).all()


def test_the_most_focused_head_is_drawn() -> None:
    row = Row(np.array([[[0.25] * 4], [[0.97, 0.01, 0.01, 0.01]], [[0.5, 0.5, 0.0, 0.0]]]), np.zeros(3))
    mean, focused = head_panels(row, ())
    assert focused.title == "head 1, most focused of 3"
    assert focused.values is not None
    assert focused.values[0, 0] == pytest.approx(97)
    assert mean.values is not None
    assert mean.values[0, 0] == pytest.approx(100 * (0.25 + 0.97 + 0.5) / 3)


EXAMPLES = {
    "agent": ((6, 8), {"agent_num": 4, "table_size": 4}),
    "agent_cswin": ((6, 8), {"agent_num": 4, "table_size": 4}),
    "cswin": ((6, 8), {"split_size": 3}),
    "halo": ((6, 8), {"block_size": 4, "halo_size": 1}),
    "hybrid_scale": ((6, 8), {"sr_ratio": 2, "window_size": 3}),
    "neighborhood": ((6, 8), {"window_size": 3}),
    "sigmoid": ((6, 8), {"n_train": 48}),
    "super_token": ((6, 8), {"stoken_size": 3}),
    "window": ((6, 8), {"window_size": 3}),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("heads", [(), (3, 0)])
def test_panels(name, heads) -> None:
    grid, options = EXAMPLES.get(name, ((6, 8), {}))
    seen = layer(name, grid, **options)
    if name == "self_guided":
        seen = Layer(seen.attention, seen.x, grid, torch.rand(1, 48))
    if name == "large_kernel" and heads:
        with pytest.raises(UsageError, match="has no heads"):
            panels_of(seen, (4, 5), heads)
        return
    first, *others = panels_of(seen, (4, 5), heads)
    assert first.values is None
    assert 2 <= len(others) <= 6
    for panel in others:
        assert panel.values is not None
        assert panel.values.shape[-2:] == grid
        assert np.isfinite(panel.values).any()
        assert bool(panel.unit) != bool(panel.classes)
        for lines in (panel.regions, panel.frame):
            assert lines is None or lines.shape == grid


@pytest.mark.parametrize("name", ["dense", "moh", "cswin", "agent"])
def test_heads_that_there_are_not(name) -> None:
    grid, options = EXAMPLES.get(name, ((6, 8), {}))
    with pytest.raises(UsageError, match=r"head 4, expected a number from 0 to 3: the layer has 4 heads"):
        panels_of(layer(name, grid, **options), (0, 0), (4,))


@pytest.mark.parametrize("place", [(6, 0), (0, 8), (-1, 0)])
def test_patches_outside(place) -> None:
    with pytest.raises(UsageError, match=r"not on the grid of 6 x 8 patches; rows count from 0 to 5"):
        panels_of(layer("dense", (6, 8)), place)


def test_attentions_without_a_picture() -> None:
    with pytest.raises(UsageError, match="MohLlamaAttention has no picture"):
        panels_of(layer("moh_llama", (6, 8)), (0, 0))


def test_the_routed_heads_are_named() -> None:
    seen = layer("moh", (4, 4), shared_heads=1, routed_heads=1)
    first, maps, _ = panels_of(seen, (1, 1))
    active = seen.attention.router(seen.x).active()[0]
    chosen = int(active[5, 1:].nonzero()[0]) + 1
    assert first.note == f"always head 0; the query is routed to {chosen}"
    assert maps.values is not None
    assert list(maps.labels) == ["1", "2", "3"]
    drawn = np.isfinite(maps.values.reshape(-1, 16)[:3]).T
    assert (drawn == active[:, 1:].numpy()).all()


def test_tiles() -> None:
    assert tiles((4, 5), (2, 3)).tolist() == [[0, 0, 0, 1, 1]] * 2 + [[2, 2, 2, 3, 3]] * 2
    assert tiles((3, 3), (2, 2), (1, 1)).tolist() == [[0, 1, 1], [2, 3, 3], [2, 3, 3]]
