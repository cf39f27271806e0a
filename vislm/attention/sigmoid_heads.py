"""What the classes of sigmoid attention share: bias and temperature, head norms, the operator, the projection.

Source: arXiv 2409.04431; official repository apple/ml-sigmoid-attention.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislm.errors import UnknownName, UsageError
from vislm.kernels import Attended, Pattern, Sigmoid, StatisticsRequest, attend
from vislm.kernels.factors import alibi_bias
from vislm.kernels.normalization import ROW_NORMS

BiasRule = Literal["-log_n", "-log_n_current"]
RowNorm = Literal["length", "sqrt_length"]

_SCALARS = ("attn_bias", "attn_temp")


class SigmoidHeads(nn.Module):
    """What self- and cross-attention share: the scalars, the head norms, the weights and the output projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool,
        bias: BiasRule | float,
        n_train: int | None,
        temperature: float,
        trainable: bool,
        row_norm: RowNorm | None,
        proj_bias: bool,
        proj_drop: float,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"{dim=} is not a multiple of {num_heads=}")
        if row_norm is not None and row_norm not in ROW_NORMS:
            raise UnknownName("row_norm", str(row_norm), ROW_NORMS)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.row_norm: RowNorm | None = row_norm
        number = _initial_bias(bias, n_train)
        self.attn_bias: float | nn.Parameter | None = _scalar(number, trainable) if number is not None else None
        self.attn_temp: float | nn.Parameter = _scalar(float(temperature), trainable)
        self.register_state_dict_post_hook(_save_scalars)
        self.register_load_state_dict_pre_hook(_load_scalars)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, tokens: Tensor) -> Tensor:
        """Return (B, N, H * D) as (B, H, N, D)."""
        return tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        statistics: StatisticsRequest | None,
        slopes: Tensor | None = None,
    ) -> Tensor | Attended:
        """Return the projected output ``(B, Nq, C)`` of heads ``(B, H, N, D)``."""
        normalize, sharpness, key_logits = self._scalars(key.shape[2])
        if sharpness is not None:
            query = (query * sharpness).to(query.dtype)
            slopes = None if slopes is None else slopes * sharpness
        bias = None
        if slopes is not None:
            half = value.dtype in (torch.float16, torch.bfloat16)
            dtype = value.dtype if half else torch.promote_types(value.dtype, torch.float32)
            bias = alibi_bias(slopes, query.shape[2], key.shape[2], split=half, dtype=dtype)
        output, measured = attend(
            query,
            key,
            value,
            pattern=pattern,
            bias=bias,
            key_logits=key_logits,
            normalize=normalize,
            statistics=statistics or StatisticsRequest(),
        )
        output = self.proj_drop(self.proj(output.transpose(1, 2).flatten(2)))
        return output if statistics is None else Attended(output, measured)

    def _scalars(self, num_keys: int) -> tuple[Sigmoid, Tensor | None, Tensor | None]:
        """Return the normalisation, a factor of all logits, and key logits: together bias and temperature."""
        bias, temperature = self.attn_bias, self.attn_temp
        if not isinstance(temperature, nn.Parameter):
            assert not isinstance(bias, nn.Parameter)  # they are trained together
            return Sigmoid(bias, temperature, self.row_norm), None, None
        # The operator takes numbers. What learns goes in as logits instead.
        normalize = Sigmoid(None if bias is None else 0.0, row_norm=self.row_norm)
        return normalize, temperature.exp(), bias.expand(num_keys) if isinstance(bias, nn.Parameter) else None


def _initial_bias(bias: BiasRule | float, n_train: int | None) -> float | None:
    """Return the number to start from, None for one that follows each call."""
    if bias == "-log_n_current":
        return None
    if bias == "-log_n":
        if n_train is None or n_train < 1:
            raise UsageError(
                f'bias="-log_n" with {n_train=}, expected the number of keys in training; bias="-log_n_current" '
                "follows each call instead"
            )
        return -math.log(n_train)
    if isinstance(bias, str):
        raise UnknownName("bias rule", bias, ("-log_n", "-log_n_current"), "A number is fine too.")
    return float(bias)


def _scalar(number: float, trainable: bool) -> float | nn.Parameter:
    return nn.Parameter(torch.tensor([number])) if trainable else number


def initialize(module: nn.Module) -> None:
    """Draw the linear maps of a module as the official code does: truncated normal with deviation 0.02, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _save_scalars(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Add what the official code keeps as buffers: numbers here, so that no GPU stalls to read them."""
    for name in _SCALARS:
        if isinstance(number := getattr(module, name), float):
            state_dict[prefix + name] = torch.tensor([number])


def _load_scalars(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Take the numbers back; a bias that follows the call's length goes on doing so."""
    for name in _SCALARS:
        if prefix + name in state_dict and not isinstance(getattr(module, name), nn.Parameter):
            number = float(state_dict.pop(prefix + name))
            if getattr(module, name) is not None:
                setattr(module, name, number)
