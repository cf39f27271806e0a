"""Gradient checkpointing: blocks are computed again in the backward pass, and nothing of their insides is kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *given: Any, recompute: bool) -> Any:
    """Return ``block(*given)``; with ``recompute`` it is computed again when gradients are."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *given, use_reentrant=False)
    return block(*given)


def set_checkpointing(model: nn.Module, enable: bool) -> None:
    """Set ``grad_checkpointing`` on every part of a model that has it."""
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            cast(Any, module).grad_checkpointing = enable
