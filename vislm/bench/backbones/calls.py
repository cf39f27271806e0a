"""The calls that are measured: a batch through a model, for inference or with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def model_call(model: nn.Module, shape: Sequence[int], training: bool) -> Callable[[], object]:
    """Return the call of a model on random images of ``shape`` ``(B, 3, H, W)``, and put it into the right mode.

    Args:
        model: evaluation mode for inference, training mode for training.
        shape: of the images.
        training: forward and backward to all parameters, and not inference.
    """
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    model.train(training)
    return _training(model, images) if training else _inference(model, images)


def _inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return call


def _training(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def call() -> None:
        model(images).square().mean().backward()
        model.zero_grad()  # gradients are made anew each time, as after an optimiser's step

    return call
