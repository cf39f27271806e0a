"""A tiny random model of every family, and inputs as its processor would make them, built without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, START, END, GLOBAL, TILE = 63, 62, 61, 60, 59, 58
"""Ids of placeholders and of the markers around images."""
LAYERS = 5


@dataclass(frozen=True)
class Picture:
    """One image or video: how many placeholders it needs and what the model gets."""

    ids: list[int]
    """Placeholders with their markers."""
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build a model and its inputs."""

    build: Callable[[], Any]
    picture: Callable[[int, int], Picture]
    """(shape number 0..2, seed) -> image; the shapes differ where the family knows several."""
    video: Callable[[int], Picture] | None = None
    pad_stack: bool = False
    """Whether pixels are stacked per sample (Idefics3) or per image with padding tiles (LLaVA-NeXT)."""


def _text(cls: Any = transformers.Qwen2Config, **more: Any) -> Any:
    return cls(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **more,
    )


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- LLaVA family ----------------------------------------------------------------------------------------------------
SIZES = [(64, 48), (32, 32), (30, 70)]
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _siglip(**more: Any) -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
        **more,
    )


def _onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _llava_picture(shape: int, seed: int) -> Picture:
    return Picture([IMAGE] * 16, {"pixel_values": _random((1, 3, 32, 32), seed)})


def _tiled(tokens: dict[int, int], tiles: dict[int, int]) -> Callable[[int, int], Picture]:
    def picture(shape: int, seed: int) -> Picture:
        pixels = _random((1, tiles[shape], 3, 32, 32), seed)
        return Picture([IMAGE] * tokens[shape], {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[shape]])})

    return picture


def _onevision_video(seed: int) -> Picture:
    frames = 3
    return Picture([VIDEO] * (frames * 4 + 1), {"pixel_values_videos": _random((1, frames, 3, 32, 32), seed)})


# -- Qwen-VL ---------------------------------------------------------------------------------------------------------
THW = [(1, 8, 6), (1, 6, 4), (1, 4, 8)]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION = {"depth": 4, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _ids(**more: Any) -> dict[str, Any]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        **more,
    }


def _qwen2() -> Any:
    vision = {**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = _text(transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig, rope_parameters=ROPE)
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text.to_dict(), **_ids())
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen25() -> Any:
    vision = {**VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
    text = _text(transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig, rope_parameters=ROPE)
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text.to_dict(), **_ids())
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    vision = {**VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    text = _text(
        transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLTextConfig, rope_parameters=ROPE, head_dim=8
    )
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text.to_dict(), **_ids())
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen_picture(shape: int, seed: int) -> Picture:
    time, rows, columns = THW[shape]
    pixels = _random((time * rows * columns, 3 * 2 * 4 * 4), seed)
    ids = [START, *[IMAGE] * (time * rows * columns // 4), END]
    return Picture(ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([THW[shape]])})


def _qwen_video(split: bool) -> Callable[[int], Picture]:
    def video(seed: int) -> Picture:
        thw = (2, 4, 6)
        pixels = _random((48, 3 * 2 * 4 * 4), seed)
        frame = [VIDEO] * 6
        ids = [START, *frame, END, 12, START, *frame, END] if split else [START, *frame, *frame, END]
        return Picture(ids, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([thw])})

    return video


# -- pixel shuffle ---------------------------------------------------------------------------------------------------
def _internvl() -> Any:
    vision = transformers.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
        use_absolute_position_embeddings=True,
    )
    config = transformers.InternVLConfig(vision_config=vision, text_config=_text(), image_token_id=IMAGE)
    return transformers.InternVLForConditionalGeneration(config)


def _internvl_picture(shape: int, seed: int) -> Picture:
    tiles = (3, 1, 5)[shape]
    return Picture([START, *[IMAGE] * (16 * tiles), END], {"pixel_values": _random((tiles, 3, 32, 32), seed)})


def _idefics(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        prefix = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        }
        config = getattr(transformers, f"{prefix}Config")(
            vision_config=vision, text_config=_text(transformers.LlamaConfig), scale_factor=2, image_token_id=IMAGE
        )
        config.text_config.pad_token_id = config.pad_token_id = 0
        return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)

    return build


def _idefics_picture(shape: int, seed: int) -> Picture:
    tiles = (4, 0, 2)[shape]
    ids = [t for number in range(tiles) for t in (END, TILE - number, *[IMAGE] * 16)]
    ids += [END, GLOBAL, *[IMAGE] * 16, END]
    return Picture(ids, {"pixel_values": _random((1, tiles + 1, 3, 32, 32), seed)})


FAMILIES = {
    "llava": Family(models.llava, _llava_picture),
    "llava_next": Family(
        models.llava_next, _tiled({0: 16 + 8 * 7, 1: 16 + 4 * 5, 2: 16 + 4 * 9}, {0: 5, 1: 3, 2: 3}), pad_stack=True
    ),
    "llava_onevision": Family(
        _onevision, _tiled({0: 16 + 6 * 5, 1: 16 + 4 * 5, 2: 16 + 4 * 9}, {0: 5, 1: 3, 2: 3}), _onevision_video, True
    ),
    "qwen2_vl": Family(_qwen2, _qwen_picture, _qwen_video(False)),
    "qwen2_5_vl": Family(_qwen25, _qwen_picture, _qwen_video(False)),
    "qwen3_vl": Family(_qwen3, _qwen_picture, _qwen_video(True)),
    "internvl": Family(_internvl, _internvl_picture),
    "idefics3": Family(_idefics("idefics3"), _idefics_picture),
    "smolvlm": Family(_idefics("smolvlm"), _idefics_picture),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in eval mode, weights large enough that attention is not uniform."""
    if name in ("llava", "llava_next"):
        return FAMILIES[name].build(seed=seed, dtype=dtype)
    torch.manual_seed(seed)
    model = models._finish(FAMILIES[name].build(), dtype)
    for module in model.modules():  # a random projector must not drown the text
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return model


def inputs(
    name: str, *prompts: tuple[list[Picture], list[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A left-padded batch: each prompt is BOS, two words, its pictures with a word behind each, then its words."""
    family, rows = FAMILIES[name], []
    for pictures, words in prompts:
        ids = [1, 5, 6]
        for picture in pictures:
            ids += [*picture.ids, 8]
        rows.append(torch.tensor([[*ids, *words]]))
    batch: dict[str, Tensor] = dict(models.left_pad(*rows)) if len(rows) > 1 else {"input_ids": rows[0]}
    if name.startswith("qwen"):
        kinds = batch["input_ids"]
        batch["mm_token_type_ids"] = (kinds == IMAGE).int() + 2 * (kinds == VIDEO).int()
    if name in ("idefics3", "smolvlm"):
        return batch | _by_sample([pictures for pictures, _ in prompts], dtype)
    for key in sorted({key for pictures, _ in prompts for picture in pictures for key in picture.tensors}):
        parts = [p.tensors[key] for pictures, _ in prompts for p in pictures if key in p.tensors]
        if family.pad_stack and key == "pixel_values":
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(p, (0, 0) * 3 + (0, width - p.shape[1])) for p in parts]
        joined = torch.cat(parts)
        batch[key] = joined.to(dtype) if joined.is_floating_point() else joined
    return batch


def _by_sample(pictures: list[list[Picture]], dtype: torch.dtype) -> dict[str, Tensor]:
    tiles = [torch.cat([p.tensors["pixel_values"][0] for p in row]) if row else torch.empty(0) for row in pictures]
    width = max(len(t) for t in tiles)
    if not width:
        return {}
    stacked = torch.zeros(len(tiles), width, 3, 32, 32)
    for row, own in zip(stacked, tiles, strict=True):
        if len(own):
            row[: len(own)] = own
    return {"pixel_values": stacked.to(dtype)}
