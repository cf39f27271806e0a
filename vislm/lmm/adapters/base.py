"""What the session knows about a model family. A family is one subclass that says what differs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vislm.errors import PlanConflict
from vislm.lmm.choosing.tokens import in_order_of_appearance, number_images
from vislm.lmm.cost.flops import TowerShape
from vislm.lmm.prompt.positions import text_row

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> argument with its raw pixels."""


@dataclass(frozen=True)
class Grid:
    """A rectangle of an image's visual tokens: token ``index[row, column]`` lies at that place of the picture."""

    height: int
    width: int
    start: int
    """Index of the first token in the image's sequence."""
    row_stride: int
    """Tokens from one row to the next (width, plus one where a newline token ends each row)."""


class Adapter:
    """Names the parts of a transformers image-text model. All attributes are read only.

    An *entry* is what the model encodes as one piece (an image, a tile, a video); an *image* of the session is what
    shares a budget: usually one entry, all tiles of a picture where every tile is an entry of its own.
    """

    family = ""
    default_prompt = "{images}\n{question}"
    """Used when the processor brings no chat template; {images} is one placeholder per image and newline."""
    placeholder = "{}"
    """What stands for an image in a prompt, around the processor's image token."""
    nested_images = False
    """Whether the processor wants the images of a batch listed prompt by prompt."""
    packed_tower = False
    """Whether the tower runs all images as one sequence (``packed_tower.py``) instead of a rectangular batch."""
    has_token_features = False
    """Whether the tower's features stand for single visual tokens, so that ``project`` has a meaning."""
    tower_conflict: str | None = None
    """Why patches cannot be dropped inside the tower, and what to use instead; None where they can."""
    mixers: tuple[str, ...] = ()
    """Methods of ``inner`` that mix neighbouring projected patches (resizing, pooling)."""
    deepstack = 0
    """Decoder layers 0 .. deepstack - 1 that add features of the tower to their output."""
    grid_positions = False
    """Whether positions have rows for time, height and width beside the text's (M-RoPE)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.inner: Any = model.model
        self.config: Any = model.config
        self.image_token_id: int = self.config.image_token_id

    @property
    def visual_ids(self) -> dict[str, int]:
        """Modality ("image", "video") -> id of its placeholder."""
        video = getattr(self.config, "video_token_id", None)
        known = {"image": self.image_token_id, "video": video}
        return {m: i for m, i in known.items() if i is not None and hasattr(self.inner, f"get_{m}_features")}

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Return which ids are placeholders of images or videos, the shape of input_ids."""
        return torch.isin(input_ids, torch.tensor(list(self.visual_ids.values()), device=input_ids.device))

    # -- vision tower ------------------------------------------------------------------------------------------------
    @property
    def vision_config(self) -> Any:
        """The tower's configuration."""
        return self.config.vision_config

    @property
    def tower(self) -> nn.Module:
        """The vision tower as the model calls it."""
        return self.inner.vision_tower

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's encoder layers, first to last."""
        raise NotImplementedError

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
        return 0

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) that the tower sees of one image or crop; None when the image decides."""
        raise NotImplementedError

    @property
    def cell(self) -> int:
        """Patches that the model joins into one visual token."""
        return 1

    @property
    def crops_per_image(self) -> int | None:
        """Crops that the tower encodes per image; None when it depends on the image."""
        return None

    @property
    def tokens_per_image(self) -> int | None:
        """Visual tokens of an image; None when it depends on the image."""
        if self.patch_grid is None or self.crops_per_image is None:
            return None
        return self.crops_per_image * self.patch_grid[0] * self.patch_grid[1] // self.cell

    @property
    def read_layer(self) -> int:
        """Index of the tower layer whose output the language model reads."""
        return len(self.tower_layers) - 1

    @property
    def tower_shape(self) -> TowerShape:
        """The tower's sizes for the cost model."""
        return TowerShape.of(self.config, self.tower_prefix)

    def tower_segments(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        """Return, for every tower layer, how many tokens attend to each other: one number per crop or frame.

        Args:
            arguments: of the tower's forward.
        """
        crops, _, height, width = arguments["pixel_values"].shape
        rows, columns = _pair(self.vision_config.patch_size)
        return [[self.tower_prefix + (height // rows) * (width // columns)] * crops] * len(self.tower_layers)

    def check_tower_signal(self, layer: int) -> None:
        """Raise ``PlanConflict`` if attention of tower layer ``layer`` does not show every patch of a crop."""
        if not 0 <= layer < len(self.tower_layers):
            raise PlanConflict(f"the vision tower has layers 0..{len(self.tower_layers) - 1}, not {layer}")

    # -- language model ----------------------------------------------------------------------------------------------
    @property
    def text_config(self) -> Any:
        """The language model's configuration."""
        return self.config.text_config

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
        """Return the rotary (cos, sin), each (B, S, d), at position_ids (B, S), or (4, B, S) for M-RoPE."""
        return self.language_model.rotary_emb(hidden, position_ids=position_ids)

    def positions(self, kwargs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return the position ids of a full prompt whose caller gave none.

        Args:
            kwargs: of the model's forward.
            mask: (B, S), 0 on padding.
        """
        return (mask.cumsum(-1) - 1).clamp(min=0)

    def counted(self, positions: Tensor) -> Tensor | None:
        """Return the text's positions (B, S) among those that ``generate`` passes to a decode step; None: not there."""
        return text_row(positions)

    # -- images ------------------------------------------------------------------------------------------------------
    def encode(self, kwargs: dict[str, Any]) -> None:
        """Replace raw pixels in a forward's kwargs by encoded images, as ``generate`` does before its prefill."""
        if kwargs.get("mm_encoder_outputs") is not None:
            return  # pixels beside them are an error that the model reports
        outputs = {}
        for modality in self.visual_ids:
            pixels = kwargs.get(PIXELS[modality])
            if pixels is None or not len(pixels):
                continue
            encoder = getattr(self.inner, f"get_{modality}_features")
            names = [n for n in inspect.signature(encoder).parameters if kwargs.get(n) is not None and n != "kwargs"]
            outputs[modality] = encoder(**{n: kwargs[n] for n in names}, return_dict=True)
        for name in PIXELS.values():
            if kwargs.pop(name, None) is not None:
                kwargs["mm_encoder_outputs"] = outputs

    def number(self, input_ids: Tensor, lengths: Mapping[str, list[int]]) -> Tensor:
        """Number the images of a batch of prompts in order of appearance.

        Args:
            input_ids: (B, S).
            lengths: modality -> visual tokens of each encoded entry; without it every run of placeholders is an image.

        Returns:
            (B, S) int64: number of the image (or video) that a column belongs to, -1 elsewhere.
        """
        keys = torch.full_like(input_ids, -1)
        for modality, placeholder in self.visual_ids.items():
            own = number_images(input_ids == placeholder, lengths.get(modality))
            keys = torch.where(own >= 0, own + int(keys.max()) + 1, keys)
        return in_order_of_appearance(keys)

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the crops of each entry that a call of ``get_image_features`` (``get_video_features``) encodes.

        Args:
            arguments: of that call.
        """
        raise NotImplementedError

    def entry_lengths(self, output: Any) -> list[int]:
        """Return the visual tokens of each entry in what ``get_image_features`` returned."""
        return [len(tokens) for tokens in output.pooler_output]

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Bring maps of patches into the order of an entry's visual tokens, as the model brings its features.

        Args:
            maps: K crops of (N, c) values per patch, prefix tokens excluded.
            arguments: of the call that encoded the entry.
            entry: its number in that call.
            newline: the value of tokens that are no patches.

        Returns:
            (n, c); a token that the model makes of several patches has their mean.
        """
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Return the projected features (m, C) of the tower's features (m, Cv).

        Raises:
            PlanConflict: the projector joins several patches.
        """
        if not self.has_token_features:
            raise PlanConflict(f"{self.family}: the projector joins patches, so single features cannot be projected")
        return self.projector(features)

    def spans(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int] | None]:
        """Return the token grid (frames, rows, columns) of each entry; None where its features tell it."""
        return [None] * len(self.crops(arguments))

    def is_patch(self, features: Tensor) -> Tensor:
        """Return (n,) bool: which of an image's tokens features (n, C) are patches rather than separators."""
        return torch.ones(features.shape[0], dtype=torch.bool, device=features.device)

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return the rectangles that an image's tokens features (n, C) form; each shows the whole picture (or frame).

        Args:
            features: of all tokens of the image.
            span: from :meth:`spans`.
        """
        if span is None:
            raise PlanConflict(f"{self.family}: where tokens lie is known only for images encoded inside the session")
        frames, rows, columns = span
        return [Grid(rows, columns, frame * rows * columns, columns) for frame in range(frames)]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
