"""What a model makes of an image of given size: crops, patches and visual tokens, known without any weights.

The family's image processor cuts a blank picture, and the adapter says what becomes of its pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vislm.errors import CheckpointError, UsageError
from vislm.lmm.adapters import FAMILIES, Adapter, adapter_for
from vislm.lmm.adapters.base import PIXELS, Grid
from vislm.lmm.loading import EMBEDDED

SHAPES = Path(__file__).parents[2] / "assets" / "shapes"
"""Configurations of published models, one YAML file each."""
_LARGEST = 100_000_000


@dataclass(frozen=True)
class ImageLayout:
    """One image as the model sees it."""

    segments: list[list[int]]
    """For every tower layer the tokens that attend to each other (prefix included), one number per crop or window."""
    patches: int
    """Patches of all crops."""
    tokens: int
    """Visual tokens in the prompt, separators included."""
    crops: tuple[int, ...]
    """Tokens that each crop (or frame) gives; separators belong to none."""
    grids: tuple[Grid, ...]
    """The rectangles that the tokens form."""

    @property
    def mixed(self) -> bool:
        """Whether patches that are dropped in the tower cannot be counted in tokens without seeing the image."""
        return len(self.crops) != 1 or self.tokens != self.crops[0]

    @classmethod
    def of(cls, adapter: Adapter, processor: Any, size: tuple[int, int]) -> ImageLayout:
        """Lay out one image of ``size`` = (width, height) pixels.

        Args:
            adapter: of the model; its weights are not needed.
            processor: its image processor; None: the tower's own image size, for models with one crop per image.
            size: of the image.

        Raises:
            UsageError: no such size, or no image processor where the number of crops depends on it.
        """
        width, height = size
        if min(size) < 1 or width * height > _LARGEST:
            raise UsageError(f"image size {width}x{height}: expected at least 1x1 and at most {_LARGEST:,} pixels")
        arguments = _arguments(adapter, processor, size)
        segments = adapter.tower_segments(_of_tower(arguments))
        prefix = adapter.tower_prefix
        patches = sum(segments[0]) - len(segments[0]) * prefix
        own = adapter.crops(arguments)
        crops = sum(own)
        number = torch.arange(crops, dtype=torch.float32)[:, None, None].expand(crops, patches // crops, 1)
        packed = torch.cat(
            [adapter.pack(part, arguments, entry, -1.0)[:, 0] for entry, part in enumerate(number.split(own))]
        ).round()
        spans = adapter.spans(arguments)
        return cls(
            segments,
            patches,
            len(packed),
            tuple(int((packed == crop).sum()) for crop in range(crops)),
            tuple(adapter.grids(_features(adapter, packed < 0), spans[0] if len(spans) == 1 else None)),
        )


def _features(adapter: Adapter, separator: Tensor) -> Tensor:
    """Return features (n, C) of which only those of separators (n,) equal the model's separator embedding."""
    newline = getattr(adapter.inner, "image_newline", None)
    newline = torch.zeros(1) if newline is None else newline.detach().float().cpu()
    return torch.where(separator[:, None], newline, newline + 1.0).to(getattr(adapter.inner, "dtype", torch.float32))


def _arguments(adapter: Adapter, processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return what the processor hands to ``get_image_features`` for a picture without content."""
    if processor is None:
        if adapter.crops_per_image != 1 or adapter.patch_grid is None:
            raise UsageError(f"the crops of an image depend on {adapter.family}'s image processor, which is missing")
        side = adapter.vision_config.image_size
        return {"pixel_values": torch.ones(1, 3, side, side)}
    picture = Image.new("RGB", size, (200, 120, 40))  # no channel is zero when normalised, as padding is
    images = [[picture]] if adapter.nested_images else [picture]
    return dict(processor(images=images, return_tensors="pt"))


def _of_tower(arguments: Mapping[str, Any]) -> dict[str, Any]:
    pixels = arguments[PIXELS["image"]]
    if "image_grid_thw" in arguments:
        return {"pixel_values": pixels, "grid_thw": arguments["image_grid_thw"]}
    return {"pixel_values": pixels.flatten(0, pixels.dim() - 4)}


def blank_model(name: str) -> tuple[Adapter, Any]:
    """Return the adapter and the image processor of a model without its weights.

    Args:
        name: an embedded model, a published shape such as "llava-1.5-7b", a folder with config.json, or a hub name.

    Raises:
        CheckpointError: no such model.
        UsageError: a family without adapter.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    source: str | None = str(EMBEDDED.get(name, name))
    if name in shape_names():
        config, source = published_config(name), None
    else:
        _check_name(name)
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot read the configuration of {name!r}: {error}") from error
    if config.model_type not in FAMILIES:
        raise UsageError(f"no adapter for the family {config.model_type!r}; available: {sorted(FAMILIES)}")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    if hasattr(model.model, "image_newline"):  # the one weight that tells separators
        model.model.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
    adapter = adapter_for(model)
    return adapter, _processor(source) or default_processor(adapter)


def shape_names() -> list[str]:
    """Return the published models whose sizes are known here."""
    return sorted(path.stem for path in SHAPES.glob("*.yaml"))


def published_config(name: str) -> Any:
    """Return the transformers configuration of a published shape."""
    import yaml
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = yaml.safe_load((SHAPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def _check_name(name: str) -> None:
    if name in EMBEDDED or Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return
    raise CheckpointError(
        f"no model {name!r}: it is neither embedded ({', '.join(EMBEDDED)}), nor a published shape "
        f"({', '.join(shape_names())}), nor a local folder, nor a hub name such as 'llava-hf/llava-1.5-7b-hf'"
    )


def _processor(source: str | None) -> Any:
    """Return the image processor saved with a model; None if there is none."""
    from transformers import AutoImageProcessor

    folder = None if source is None else Path(source)
    files = ("preprocessor_config.json", "processor_config.json")
    if folder is None or (folder.is_dir() and not any((folder / name).is_file() for name in files)):
        return None
    try:
        return AutoImageProcessor.from_pretrained(source, local_files_only=folder.is_dir())
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the image processor of {source!r}: {error}") from error


def default_processor(adapter: Adapter) -> Any:
    """Return the family's image processor with the model's sizes; None where the tower's image size says it all."""
    import transformers

    vision, config, family = adapter.vision_config, adapter.config, adapter.family
    if family in ("llava_next", "llava_onevision"):
        side, pinpoints = vision.image_size, config.image_grid_pinpoints
        if family == "llava_next":
            return transformers.LlavaNextImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_grid_pinpoints=pinpoints,
            )
        return transformers.LlavaOnevisionImageProcessor(
            size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
        )
    if family.startswith("qwen"):
        side = vision.patch_size * vision.spatial_merge_size
        return transformers.Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": 4 * side**2, "longest_edge": 16384 * side**2},
        )
    if family == "internvl":
        height, width = vision.image_size
        return transformers.GotOcr2ImageProcessor(
            size={"height": height, "width": width}, crop_to_patches=True, min_patches=1, max_patches=12
        )
    if family in ("idefics3", "smolvlm"):
        side = vision.image_size
        return transformers.Idefics3ImageProcessor(
            size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
        )
    return None
