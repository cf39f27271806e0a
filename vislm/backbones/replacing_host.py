"""The module that stands where another attention stood: the other's projections around an attention of ours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vislm.attention.large_kernel import LargeKernelAttention
from vislm.attention.tokens import merge_heads, split_heads, to_map, to_tokens
from vislm.backbones.replacing_adoption import adopt, coarse_grid
from vislm.errors import UsageError
from vislm.kernels import attend

if TYPE_CHECKING:
    from vislm.backbones.replacing_forms import Form


class GridOfTokens:
    """Hears the patch embedding and remembers the last grid of patches."""

    def __init__(self) -> None:
        self.sizes: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Take note of the sides of the embedding's map ``(B, C, H, W)``; a forward hook."""
        self.sizes = (int(output.shape[2]), int(output.shape[3]))


class Significance:
    """The map ``(B, N)`` that a hybrid-scale attention leaves for the self-guided one in the next layer."""

    def __init__(self) -> None:
        self.map: Tensor | None = None


class ReplacedAttention(nn.Module):
    """An attention in place of another one, whose parameters it keeps under their names.

    Attributes:
        attention: name of the attention.
        mixer: the attention, without projections of its own; what it adds to the state dict.
        tells: where a hybrid-scale attention leaves its map, None = nowhere.
        hears: where a self-guided attention finds it.
    """

    def __init__(self, original: nn.Module, form: Form, attention: str, mixer: nn.Module, grid: GridOfTokens) -> None:
        super().__init__()
        self.attention, self.form, self.grid = attention, form, grid
        self.tells: Significance | None = None
        self.hears: Significance | None = None
        self._rope: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        exchange(original, self)
        self.mixer = mixer
        self.num_prefix_tokens: int = getattr(mixer, "num_prefix_tokens", 0)
        adopt(mixer, attention, self._projected)
        self.train(original.training)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters of the original without a use here."""
        if not isinstance(self.mixer, LargeKernelAttention) or self.num_prefix_tokens:
            return ()
        only = ("q_proj.", "k_proj.", "q_norm.", "k_norm.", "q_bias", "k_bias", "ln_q.", "ln_k.", "logit_scale")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(only))

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            rope: the model's rotary positions.
            attn_mask: has to be None.
            is_causal: has to be False.

        Raises:
            UsageError: a mask, or an attention that no patch embedding went before.
        """
        if attn_mask is not None or is_causal:
            raise UsageError(f"attention was replaced by {self.attention}, which takes no mask; undo the replacement")
        if self.grid.sizes is None:
            raise UsageError("the grid of patches is not known; call the whole model, not a block of it alone")
        self._rope = rope
        try:
            attended = self._attended(x, self.grid.sizes)
        finally:
            self._rope = self._last = None
        return self.form.finish(self, attended, x)

    def _attended(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the merged heads ``(B, N, C)``."""
        if self.hears is not None:
            return self.mixer(x, grid, self.hears.map)
        if self.tells is not None:
            attended, self.tells.map = self.mixer(x, grid, significance=True)
            return attended
        attended = self.mixer(x, grid)
        if not isinstance(self.mixer, LargeKernelAttention) or self.num_prefix_tokens == 0:
            return attended
        # A convolution does not reach prefix tokens: they go on reading from all tokens as before.
        query, key, value = (split_heads(part, self.form.num_heads) for part in self._projected(x).chunk(3, dim=-1))
        read = merge_heads(attend(query[:, :, : self.num_prefix_tokens], key, value))
        return torch.cat((read, attended[:, self.num_prefix_tokens :]), dim=1)

    def _projected(self, x: Tensor) -> Tensor:
        """Return ``[q | k | v]`` of tokens ``(B, N, C)``; asked again for the same ones, the same."""
        if self._last is None or self._last[0] is not x:
            self._last = x, self.form.project(self, x, self._rope_of(x.shape[1]))
        return self._last[1]

    def _rope_of(self, tokens: int) -> Tensor | None:
        """Return the rotary positions of so many tokens: those of averaged ones are the mean of their tokens'."""
        assert self.grid.sizes is not None
        coarse = coarse_grid(self.mixer, self.grid.sizes)
        if self._rope is None or coarse is None or tokens >= self._rope.shape[-2]:
            return self._rope
        rope = self._rope.reshape(-1, *self._rope.shape[-2:])
        pooled = to_tokens(adaptive_avg_pool2d(to_map(rope, self.grid.sizes), coarse))
        return pooled.reshape(*self._rope.shape[:-2], math.prod(coarse), -1)


class ReplacedMultihead(ReplacedAttention):
    """The same in place of ``torch.nn.MultiheadAttention``."""

    def __init__(self, original: nn.MultiheadAttention, *others: Any) -> None:
        super().__init__(original, *others)
        self.batch_first = original.batch_first

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the signature of the module it stands for
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the output, and None for the weights; query, key and value have to be the same tensor."""
        if need_weights or key is not query or value is not query:
            raise UsageError(f"attention was replaced by {self.attention}: self-attention without returned weights")
        x = query if self.batch_first else query.transpose(0, 1)
        x = super().forward(x, attn_mask=attn_mask)
        return (x if self.batch_first else x.transpose(0, 1)), None


def exchange(source: nn.Module, target: nn.Module) -> None:
    """Give the target all parameters, buffers and modules of the source, but for a ``mixer``."""
    for name, parameter in source._parameters.items():
        target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if name != "mixer":
            target.add_module(name, child)
