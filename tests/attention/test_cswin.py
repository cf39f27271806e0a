"""Cross-shaped windows, with full attention and with agents inside the stripes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vislm.attention import AgentCswinAttention, CswinAttention
from vislm.attention.stripes import branch_stripes
from vislm.errors import UsageError

CASES = [((8, 8), 2), ((7, 10), 3), ((5, 4), 7), ((6, 9), None), ((1, 5), 2)]


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.eval()


def stripe_slices(grid, split, branch):
    """Return the (rows, columns) of each stripe of a branch."""
    axis = grid[1 - branch]
    width = axis if split is None else split
    if split is None:
        return [(slice(None), slice(None))]
    parts = [slice(start, start + width) for start in range(0, axis, width)]
    return [(slice(None), part) if branch == 0 else (part, slice(None)) for part in parts]


def test_stripes_are_cut_and_joined() -> None:
    x = torch.arange(2 * 35 * 3.0).view(2, 35, 3)
    for branch in (0, 1):
        stripes = branch_stripes((5, 7), 3, branch)
        assert torch.equal(stripes.join(stripes.split(x)), x)
    cut = branch_stripes((5, 7), 3, 0).split(x).view(2, 3, 5, 3, 3)
    assert torch.equal(cut[:, 1], x.view(2, 5, 7, 3)[:, :, 3:6])
    assert torch.equal(cut[:, 2, :, 0], x.view(2, 5, 7, 3)[:, :, 6])
    assert not cut[:, 2, :, 1:].any()


@pytest.mark.parametrize(("grid", "split"), CASES)
def test_equals_attention_in_each_stripe(grid, split) -> None:
    torch.manual_seed(0)
    module = randomized(CswinAttention(16, 4, split))
    branches = 1 if split is None else 2
    assert len(module.attns) == branches
    x = torch.randn(2, grid[0] * grid[1], 16)
    qkv = module.qkv(x).view(2, *grid, 3, branches, 16 // branches)
    out = torch.empty(2, *grid, branches, 16 // branches)
    for branch in range(branches):
        for rows, columns in stripe_slices(grid, split, branch):
            part = qkv[:, rows, columns, :, branch]
            query, key, value = part.flatten(1, 2).unflatten(3, (4 // branches, 4)).permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(part[:, :, :, 0].shape)
            local = module.attns[branch].dwc(part[:, :, :, 2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            out[:, rows, columns, branch] = attended + local
    torch.testing.assert_close(module(x, grid), module.proj(out.flatten(3).flatten(1, 2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("grid", "split"), CASES)
def test_agents_are_those_of_the_stripe(grid, split) -> None:
    """Where whole stripes fit, each gives what it gives alone."""
    torch.manual_seed(0)
    module = randomized(AgentCswinAttention(16, 4, 1, grid, split))
    x = torch.randn(2, grid[0] * grid[1], 16)
    y = module(x, grid)
    branches = len(module.attns)
    qkv = module.qkv(x).view(2, *grid, 3, branches, 16 // branches)
    out = torch.empty(2, *grid, branches, 16 // branches)
    for branch, attention in enumerate(module.attns):
        height, width = branch_stripes(grid, split, branch).size
        assert attention.ah_bias.shape[3] == height
        assert attention.wa_bias.shape[3] == width
        for rows, columns in stripe_slices(grid, split, branch):
            part = qkv[:, rows, columns, :, branch]
            if part.shape[1:3] != (height, width):
                out[:, rows, columns, branch] = torch.nan
                continue
            query, key, value = part.flatten(1, 2).unbind(2)
            mixed = attention.mix(query, key, value, (height, width), (height, width))
            out[:, rows, columns, branch] = mixed.view(part[:, :, :, 0].shape)
    if bool(out.isfinite().all()):
        torch.testing.assert_close(y, module.proj(out.flatten(3).flatten(1, 2)), atol=1e-4, rtol=1e-4)
    assert bool(y.isfinite().all())


def test_padded_stripes_ignore_the_padding() -> None:
    """A narrow last stripe attends like a map of that width with the tables of the whole stripe."""
    torch.manual_seed(0)
    module = randomized(AgentCswinAttention(4, 2, 1, (4, 6), 4))
    attention = module.attns[0]
    with torch.no_grad():  # without position biases, resized tables and cropped ones are the same
        for name in attention.no_weight_decay():
            getattr(attention, name).zero_()
    x = torch.randn(1, 4 * 6, 4)
    seen = []
    module.proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    module(x, (4, 6))
    query, key, value = (part[..., :2].view(1, 4, 6, 2)[:, :, 4:].flatten(1, 2) for part in module.qkv(x).chunk(3, -1))
    alone = attention.mix(query, key, value, (4, 2), (4, 2)).view(1, 4, 2, 2)
    torch.testing.assert_close(seen[0].view(1, 4, 6, 4)[:, :, 4:, :2], alone, atol=1e-5, rtol=1e-5)


def test_prefix_tokens_see_and_are_seen() -> None:
    torch.manual_seed(0)
    module = randomized(CswinAttention(8, 2, 2, num_prefix_tokens=1))
    x = torch.randn(1, 1 + 30, 8, requires_grad=True)
    (to_prefix,) = torch.autograd.grad(module(x, (5, 6))[:, 0].sum(), x)
    assert bool((to_prefix.abs().sum(-1) > 0).all())
    (to_all,) = torch.autograd.grad(module(x, (5, 6))[:, 1:].square().sum(), x)
    assert to_all[0, 0].abs().sum() > 0


@pytest.mark.parametrize("module", [CswinAttention(8, 2, 3), AgentCswinAttention(8, 2, 4, 6, 3)])
def test_batches_gradients_and_half_precision(module) -> None:
    torch.manual_seed(0)
    randomized(module).zero_grad()
    x = torch.randn(3, 5 * 7, 8)
    y = module(x, (5, 7))
    torch.testing.assert_close(y, torch.cat([module(s[None], (5, 7)) for s in x]), atol=1e-5, rtol=1e-5)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x, (5, 7)).float(), y, atol=0.3, rtol=0.1)


def test_macs() -> None:
    tokens, dim = 8 * 6, 16
    base = 4 * tokens * dim**2 + 9 * tokens * dim
    assert CswinAttention(dim, 4, None).macs((8, 6)) == base + 2 * tokens**2 * dim
    assert CswinAttention(dim, 4, 2).macs((8, 6)) == base + tokens * dim * (8 * 2 + 6 * 2)
    assert CswinAttention(dim, 4, 4).macs((8, 6)) == base + 8 * dim * (6 * 6 * 4 + 8 * (16 + 4))
    assert AgentCswinAttention(dim, 4, 4, 8, 2).macs((8, 6)) == base + 4 * 4 * tokens * dim


def test_dropout() -> None:
    module = CswinAttention(8, 2, 2, attn_drop=1.0)
    for attention in module.attns:
        attention.dwc.weight.data.zero_()
        attention.dwc.bias.data.zero_()
    x = torch.randn(1, 16, 8)
    torch.testing.assert_close(module(x, (4, 4)), module.proj.bias.expand(1, 16, 8))


@pytest.mark.parametrize("cls", [CswinAttention, AgentCswinAttention])
def test_bad_options(cls) -> None:
    with pytest.raises(UsageError, match="even numbers"):
        cls(9, 3, split_size=2)
    with pytest.raises(UsageError, match="positive split_size"):
        cls(8, 2, split_size=0)
    with pytest.raises(UsageError, match="an odd number"):
        cls(8, 2, kernel_size=4)
    with pytest.raises(UsageError, match="not a multiple"):
        cls(8, 3, split_size=None)
    with pytest.raises(UsageError, match="expected 2 positive sizes"):
        cls(8, 2)(torch.zeros(1, 8, 8), (8,))
