"""Other ways to compute a local pattern: the peers that our backends are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vislm.bench.kernels.cases import Case, Setting, Skip, halo_tables, halo_width, inputs_of, pattern_of
from vislm.kernels import GridPattern
from vislm.report.units import bytes_text

SDPA, FLEX, GATHER, EAGER = "SDPA, boolean mask", "FlexAttention, compiled", "gather per query", "eager softmax, mask"
NATTEN, HALO = "NATTEN", "timm HaloAttn"


def peer_cases(setting: Setting, against: str) -> Iterator[Case | Skip]:
    """Yield the peers of a setting that compute what our case ``against`` does."""
    makers = {"sdpa": _sdpa, "flex": _flex, "gather": _gather, "eager": _eager}
    if setting.pattern == "neighborhood":
        makers["natten"] = _natten
    for name, make in makers.items():
        if name in setting.peers:
            yield make(setting, against)


def halo_attn_case(setting: Setting, against: str) -> Case | Skip:
    """Return timm's layer without its projections, to be compared with our case ``against``.

    It gets query, key and value as maps in its own layout, and so pays for no conversion.
    """
    if find_spec("timm") is None:
        return Skip(HALO, "timm is not installed")
    from timm.layers.halo_attn import HaloAttn

    heads, width, halo = setting.heads, setting.heads * setting.head_dim, setting.window // 2
    layer = HaloAttn(width, num_heads=heads, dim_head=setting.head_dim, block_size=setting.window, halo_size=halo).to(
        setting.device, getattr(torch, setting.dtype)
    )
    given = {"q": _Given(), "kv": _Given()}
    for name, module in given.items():
        setattr(layer, name, module)
    assert layer.pos_embed.height_rel.shape[0] == 2 * halo_width(setting) - 1

    def maps(tensor: Tensor) -> Tensor:
        return tensor.transpose(2, 3).flatten(1, 2).unflatten(2, setting.grid).contiguous()

    def call(q: Tensor, kv: Tensor, height: Tensor, width: Tensor) -> Tensor:
        given["q"].tensor, given["kv"].tensor = q, kv
        tables = {"pos_embed.height_rel": height, "pos_embed.width_rel": width}
        return torch.func.functional_call(layer, tables, (q,))

    query, key, value = inputs_of(setting)
    return Case(
        HALO,
        (maps(query), maps(torch.cat([key, value], dim=-1)), *halo_tables(setting)),
        call,
        against,
        heads_first=lambda output: output.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3),
    )


class _Given(torch.nn.Module):
    """Stands for a projection whose result is there already."""

    tensor: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def _sdpa(setting: Setting, against: str) -> Case | Skip:
    pairs, inputs = setting.tokens**2, inputs_of(setting)
    # its kernels turn the boolean mask into additive logits first
    skip = _too_large(SDPA, pairs * (1 + inputs[0].element_size()), setting, "the N x N mask, boolean and additive")
    if skip is not None:
        return skip
    mask = _mask(pattern_of(setting), setting)
    return Case(SDPA, inputs, partial(scaled_dot_product_attention, attn_mask=mask), against, held=mask.nbytes)


def _eager(setting: Setting, against: str) -> Case | Skip:
    pairs, inputs = setting.tokens**2, inputs_of(setting)
    per_pair = setting.heads * inputs[0].element_size()
    skip = _too_large(EAGER, pairs * (1 + 3 * per_pair), setting, "the N x N logits and weights")
    if skip is not None:
        return skip
    mask = _mask(pattern_of(setting), setting)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) * setting.head_dim**-0.5
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    backward = _too_large(EAGER, pairs * (1 + 5 * per_pair), setting, "the N x N weights and their gradients")
    return Case(EAGER, inputs, call, against, mask.nbytes, None if backward is None else backward.reason)


def _gather(setting: Setting, against: str) -> Case | Skip:
    inputs, (index, visible) = inputs_of(setting), _key_index(pattern_of(setting), setting.device)
    gathered = 2 * index.numel() * setting.heads * setting.head_dim * inputs[0].element_size()
    skip = _too_large(GATHER, gathered, setting, "the keys and values of every query")
    if skip is not None:
        return skip

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhnd,bhnkd->bhnk", q, k[:, :, index]) * setting.head_dim**-0.5
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        return torch.einsum("bhnk,bhnkd->bhnd", logits.softmax(-1), v[:, :, index])

    backward = _too_large(GATHER, 2 * gathered, setting, "the keys and values of every query and their gradients")
    held = index.nbytes + (0 if visible is None else visible.nbytes)
    return Case(GATHER, inputs, call, against, held, None if backward is None else backward.reason)


def _flex(setting: Setting, against: str) -> Case | Skip:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern, tokens = pattern_of(setting), setting.tokens
    torch.compiler.reset()  # every setting compiles anew: sizes are constants
    # uncompiled, making the block mask needs integers for all pairs
    fits = 9 * tokens**2 <= setting.memory_limit
    make: Callable[..., object] = create_block_mask if fits else torch.compile(create_block_mask)
    block_mask = make(lambda b, h, q, k: pattern.mask(q, k), None, None, tokens, tokens, device=setting.device)
    return Case(
        FLEX,
        inputs_of(setting),
        partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask),
        against,
        no_backward="FlexAttention has no backward on the CPU" if setting.device == "cpu" else None,
    )


def _natten(setting: Setting, against: str) -> Case | Skip:
    if find_spec("natten") is None:
        return Skip(NATTEN, "natten is not installed")
    import natten  # pyright: ignore[reportMissingImports]

    operator = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(setting.grid)]
    query, key, value = (
        tensor.transpose(1, 2).unflatten(1, setting.grid).contiguous() for tensor in inputs_of(setting)
    )
    return Case(
        NATTEN,
        (query, key, value),
        partial(operator, kernel_size=(setting.window,) * len(setting.grid)),
        against,
        no_backward="NATTEN has no backward on the CPU" if setting.device == "cpu" else None,
        heads_first=lambda output: output.flatten(1, -3).transpose(1, 2),
    )


def _mask(pattern: GridPattern, setting: Setting) -> Tensor:
    """Return the pattern's mask ``(N, N)``, made in bands: the coordinates of all pairs would need far more memory."""
    key = torch.arange(setting.tokens, device=setting.device)
    bands = key.split(max(1, (1 << 22) // setting.tokens))
    return torch.cat([pattern.mask(band[:, None], key[None]) for band in bands])


def _key_index(pattern: GridPattern, device: str) -> tuple[Tensor, Tensor | None]:
    """Return the keys ``(N, K)`` of every query, and which of them are not fillers; None = all."""
    index = torch.zeros(1, 1, dtype=torch.long)
    visible = torch.ones(1, 1, dtype=torch.bool)
    for axis, size in enumerate(pattern.grid):
        first, last = pattern.span(axis, torch.arange(size))
        step = pattern.step(axis)
        key = first[:, None] + step * torch.arange(int(((last - first) // step).max()) + 1)
        inside = key <= last[:, None]
        index = (index[:, None, :, None] * size + key.clamp_max(size - 1)[None, :, None, :]).flatten(2).flatten(0, 1)
        visible = (visible[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
    return index.to(device), None if bool(visible.all()) else visible.to(device)


def _too_large(name: str, needed: int, setting: Setting, what: str) -> Skip | None:
    if needed <= setting.memory_limit:
        return None
    return Skip(name, f"{what} need {bytes_text(needed)}, the limit is {bytes_text(setting.memory_limit)}")
