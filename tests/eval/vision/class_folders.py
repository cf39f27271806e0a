"""Small data sets of plain coloured pictures, and tiny models, for the tests of classification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vislm.eval.vision.class_lists import imagenet_classes

WNIDS = imagenet_classes().names
TINY = "vit_tiny_patch16_224@random:img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=2"
"""A model of timm: 16 patches, 1000 outputs."""
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}


def picture(path: Path, colour: Sequence[int], size: tuple[int, int] = (40, 36)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour[0], colour[1], colour[2])).save(path, format="PNG")
    return path


def colour_folders(root: Path, part: str, each: int) -> Path:
    """Write ``root/part/<colour>/<n>.png``; the pictures of a colour differ a little."""
    for name, colour in COLOURS.items():
        for number in range(each):
            picture(root / part / name / f"{number:02d}.png", [max(0, c - 3 * number) for c in colour])
    return root


def tiny_clip(folder: Path) -> str:
    """Let open_clip know a tiny architecture; return its name."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    config: dict[str, Any] = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    path = folder / "vislm-test-clip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return path.stem
