"""LLaVA-1.5 and every model that transformers builds as ``LlavaForConditionalGeneration``.

Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024; transformers ``models/llava``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vislm.errors import PlanConflict


@dataclass(frozen=True)
class Grid:
    """A rectangle of an image's visual tokens: token ``index[row, column]`` lies at that place of the picture."""

    height: int
    width: int
    start: int
    """Index of the first token in the image's sequence."""
    row_stride: int
    """Tokens from one row to the next (width, plus one where a newline token ends each row)."""


class LlavaAdapter:
    """Names the parts of a LLaVA model. All attributes are read only."""

    family = "llava"
    default_prompt = "USER: {images}\n{question} ASSISTANT:"
    """Used when the processor brings no chat template; {images} is one placeholder per image and newline."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.inner: Any = model.model
        self.config: Any = model.config
        self.image_token_id: int = self.config.image_token_id

    # -- vision tower ------------------------------------------------------------------------------------------------
    @property
    def tower(self) -> nn.Module:
        """The vision tower as the model calls it."""
        return self.inner.vision_tower

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's encoder layers, first to last."""
        for path in ("encoder.layers", "vision_model.encoder.layers"):
            try:
                return list(self.tower.get_submodule(path))  # pyright: ignore[reportArgumentType]
            except AttributeError:
                continue
        raise PlanConflict(f"cannot find the encoder layers of the vision tower {type(self.tower).__name__}")

    @property
    def tower_attentions(self) -> list[nn.Module]:
        """The attention module of every tower layer."""
        return [layer.get_submodule("self_attn") for layer in self.tower_layers]

    @property
    def projector(self) -> nn.Module:
        """The module between the tower's features and the language model."""
        return self.inner.multi_modal_projector

    @property
    def tower_prefix(self) -> int:
        """Prefix tokens (CLS) before the patch tokens inside the tower."""
        return 1 if self.config.vision_config.model_type == "clip_vision_model" else 0

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of one image or crop."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    @property
    def crops_per_image(self) -> int | None:
        """Crops that the tower encodes per image; None when it depends on the image."""
        return 1

    @property
    def read_layer(self) -> int:
        """Index of the tower layer whose output the language model reads.

        Raises:
            PlanConflict: the model concatenates several layers, which cannot have different lengths.
        """
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            if len(layer) != 1:
                raise PlanConflict(f"the model reads several tower layers ({layer}); prune after the tower instead")
            layer = layer[0]
        return (layer if layer >= 0 else len(self.tower_layers) + 1 + layer) - 1

    # -- language model ----------------------------------------------------------------------------------------------
    @property
    def language_model(self) -> Any:
        """The decoder without its head."""
        return self.inner.language_model

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return list(self.language_model.layers)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention module of every decoder layer."""
        return [layer.get_submodule("self_attn") for layer in self.layers]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return text embeddings (B, S, C)."""
        return self.language_model.embed_tokens(input_ids)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary (cos, sin), each (B, S, d), at position_ids (B, S)."""
        return self.language_model.rotary_emb(hidden, position_ids=position_ids)

    # -- images ------------------------------------------------------------------------------------------------------
    def encode(self, kwargs: dict[str, Any]) -> None:
        """Replace raw pixels in a forward's kwargs by encoded images, as ``generate`` does before its prefill."""
        encoder = self.inner.get_image_features
        names = [n for n in inspect.signature(encoder).parameters if kwargs.get(n) is not None and n != "kwargs"]
        kwargs["mm_encoder_outputs"] = {"image": encoder(**{n: kwargs[n] for n in names}, return_dict=True)}
        for name in names:
            del kwargs[name]

    def is_patch(self, features: Tensor) -> Tensor:
        """Return (n,) bool: which of an image's tokens features (n, C) are patches rather than separators."""
        return torch.ones(features.shape[0], dtype=torch.bool, device=features.device)

    has_token_features = True
    """Whether a patch has features of its own before the projector (no merger or shuffle joins patches)."""

    def project(self, features: Tensor) -> Tensor:
        """Return the language model's tokens (m, C) for patch features (m, Cv); where ``has_token_features``."""
        return self.projector(features)

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        """Return how many crops the tower encodes for each image, from the arguments of ``get_image_features``."""
        return [1] * len(arguments["pixel_values"])

    def pack(self, maps: Tensor, arguments: dict[str, Any], image: int, newline: float) -> Tensor:
        """Bring maps (K, N, c) of one image's crops into the order of its tokens (n, c), as the model packs features.

        Args:
            maps: values per patch; prefix tokens are not among them.
            arguments: those of ``get_image_features``.
            image: number of the image in that call.
            newline: value of separator tokens.
        """
        return maps[0]

    def grids(self, features: Tensor) -> list[Grid]:
        """Return the rectangles that an image's tokens features (n, C) form."""
        height, width = self.patch_grid
        return [Grid(height, width, start=0, row_stride=width)]
