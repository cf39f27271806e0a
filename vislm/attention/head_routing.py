"""Routing of tokens to heads: which heads each token uses, how much each counts, and the loss that balances them (MoH).

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vislm.attention.active_heads import skipping_pays
from vislm.errors import UsageError


class Routing(NamedTuple):
    """What a router decides; float32 (float64 for float64 tokens).

    Attributes:
        gate: ``(B, N, H)``, the factor of each head's output; 0 for the heads that a token does not use.
        probabilities: ``(B, N, E)`` over the routed heads, None without any.
        kept: bool ``(B, N, E)``, which routed heads a token uses, None without any.
    """

    gate: Tensor
    probabilities: Tensor | None = None
    kept: Tensor | None = None

    def active(self) -> Tensor:
        """Return which heads each token uses, bool ``(B, N, H)``: all shared heads, the routed ones that it kept."""
        if self.kept is None:
            return torch.ones_like(self.gate, dtype=torch.bool)
        shared = self.gate.shape[-1] - self.kept.shape[-1]
        return torch.cat((self.kept.new_ones(*self.kept.shape[:2], shared), self.kept), dim=-1)

    def load_balance_loss(self, valid: Tensor | None = None) -> Tensor:
        """Return ``E sum_i mean(p_i) mean([i kept])`` over all tokens, a scalar.

        It is the number of routed heads per token when all are used alike, and grows with the imbalance. Gradients
        flow through the probabilities alone.

        Args:
            valid: bool ``(B, N)``, False for padding, which does not count.

        Raises:
            UsageError: there are no routed heads.
        """
        if self.probabilities is None or self.kept is None:
            raise UsageError("there is no load-balance loss without routed heads")
        return balance(self.probabilities, self.kept, valid)


def balance(probabilities: Tensor, kept: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the load-balance loss of :class:`Routing` for ``(B, N, E)`` probabilities and choices."""
    weight = torch.ones_like(kept[..., :1]) if valid is None else valid[..., None]
    weight = weight.to(probabilities.dtype) / weight.sum()
    share = (probabilities * weight).sum(dim=(0, 1))
    load = (kept * weight).sum(dim=(0, 1))
    return kept.shape[-1] * (share * load).sum()


class HeadRouter(nn.Module):
    """Linear routers of tokens to heads: shared heads, always used, then routed ones, of which each token keeps a few.

    With ``p = softmax(wg x)`` over the routed heads and k of them kept, ``r_i = k p_i / sum_kept p``; the shared heads
    have ``s = h_s softmax(wg_1 x)``; and ``(a_1, a_2) = 2 softmax(wg_0 x)`` weighs the groups: ``gate = [a_1 s | a_2
    r]``. Uniform routing gives every used head the factor 1. All of it is computed in float32, also under autocast,
    since a rounded score may choose another head; of equal scores the first wins.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: h_s, the heads in front that every token uses.
        routed_heads: k, how many of the other ``E = H - h_s`` each token uses; 0 if and only if there are none.

    Raises:
        UsageError: numbers that do not fit.
    """

    def __init__(self, dim: int, num_heads: int, shared_heads: int, routed_heads: int) -> None:
        super().__init__()
        others = num_heads - shared_heads
        if not 0 <= routed_heads <= others or shared_heads < 0 or (routed_heads == 0) != (others == 0):
            raise UsageError(
                f"{shared_heads=} and {routed_heads=} of {num_heads=}; expected shared_heads from 0 to {num_heads}, "
                f"and routed_heads from 1 to the {others} others (0 if all heads are shared)"
            )
        self.num_heads, self.shared_heads, self.routed_heads = num_heads, shared_heads, routed_heads
        self.wg = nn.Linear(dim, others, bias=False) if others else None
        self.wg_1 = nn.Linear(dim, shared_heads, bias=False) if shared_heads > 1 else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if others and shared_heads else None

    def forward(self, x: Tensor) -> Routing:
        """Return the routing of tokens ``(B, N, C)``."""
        shared = _softmax(self.wg_1, x) * self.shared_heads if self.wg_1 is not None else _ones(x, self.shared_heads)
        if self.wg is None:
            return Routing(shared)
        probabilities = _softmax(self.wg, x)
        kept = _largest(probabilities, self.routed_heads)
        used = probabilities * kept
        least = torch.finfo(used.dtype).eps
        routed = self.routed_heads * used / used.sum(dim=-1, keepdim=True).clamp_min(least)
        if self.wg_0 is None:
            return Routing(routed, probabilities, kept)
        groups = 2 * _softmax(self.wg_0, x)
        return Routing(torch.cat((groups[..., :1] * shared, groups[..., 1:] * routed), dim=-1), probabilities, kept)

    def skips(self, wanted: bool | None, num_keys: int) -> bool:
        """Return whether to compute the used (token, head) pairs alone: as ``wanted``, with None where it is faster."""
        used = self.shared_heads + self.routed_heads
        return skipping_pays(num_keys, self.num_heads, used) if wanted is None else wanted

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of one image."""
        return tokens * sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}"


class QueryNormRouter(nn.Module):
    """Routing without parameters, for a model trained without it: by the norm of each head's query (MoH-LLaMA3).

    Each token keeps the routed heads with the largest ``|q_i|``. Gates are 1 or 0; their gradient is that of ``p =
    softmax(|q_i| / std_i |q_i|)`` (straight-through).

    Args:
        shared_heads: the heads in front that every token uses.
        routed_heads: how many of the others each token uses.
    """

    def __init__(self, shared_heads: int, routed_heads: int) -> None:
        super().__init__()
        self.shared_heads, self.routed_heads = shared_heads, routed_heads

    def forward(self, query: Tensor) -> Routing:
        """Return the routing for queries ``(B, H, N, D)``, before rotary embedding."""
        scores = query[:, self.shared_heads :].to(_routing_dtype(query)).norm(dim=-1).transpose(1, 2)
        others = scores.shape[-1]
        if others == 0:
            return Routing(_ones(scores, self.shared_heads))
        # A single score has no unbiased deviation; its probability is 1 whatever the spread.
        spread = scores.std(dim=-1, correction=min(1, others - 1), keepdim=True)
        spread = spread.clamp_min(torch.finfo(scores.dtype).eps)
        probabilities = (scores / spread).softmax(dim=-1)
        kept = _largest(probabilities, self.routed_heads)
        routed = kept + (probabilities - probabilities.detach())
        return Routing(torch.cat((_ones(routed, self.shared_heads), routed), dim=-1), probabilities, kept)

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}"


ROUTERS = (HeadRouter, QueryNormRouter)
"""Modules that return a :class:`Routing`."""


@contextmanager
def head_routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Give the list of the routings of one forward pass, in order, of all layers with routed heads.

    ::

        with head_routings(model) as routings:
            logits = model(images)
        loss = cross_entropy(logits, labels) + 0.01 * load_balance_losses(routings).mean()

    A layer counts once, so a recomputation in the backward pass (activation checkpointing) adds nothing; open the
    context anew for every forward pass. Nothing is collected outside.
    """
    routings, seen = list[Routing](), set[nn.Module]()

    def collect(module: nn.Module, inputs: object, routing: Routing) -> None:
        if routing.kept is not None and module not in seen:
            seen.add(module)
            routings.append(routing)

    hooks = [module.register_forward_hook(collect) for module in model.modules() if isinstance(module, ROUTERS)]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


def load_balance_losses(routings: Sequence[Routing]) -> Tensor:
    """Return the load-balance loss of each layer, ``(L,)``; training adds 0.01 times their mean.

    Raises:
        UsageError: no routings, or one without routed heads.
    """
    if not routings:
        raise UsageError("there are no routings; collect them with head_routings(model) around the forward pass")
    return torch.stack([routing.load_balance_loss() for routing in routings])


def _softmax(router: nn.Linear, x: Tensor) -> Tensor:
    dtype = _routing_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), router.weight.to(dtype)).softmax(dim=-1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return where the ``count`` largest scores of each token are, bool; of equal ones the first."""
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def _ones(x: Tensor, count: int) -> Tensor:
    return x.new_ones(*x.shape[:2], count, dtype=_routing_dtype(x))


def _routing_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
