"""What a model that lies in a folder or a YAML file is, wherever that lies: names and digests for fingerprints.

A path says nothing about a model: the same folder has a relative and an absolute one, and another on each machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from vislm.files import sha256

_TIMM_SETTINGS = ("num_classes", "global_pool", "model_args")
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "bpe_")
"""How the names of tokenizers' files begin."""


def timm_identity(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return name and settings of the architecture in a folder that timm wrote, which timm has read already."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: config.get(key) for key in _TIMM_SETTINGS}
    return {"model": config.get("architecture", type(model).__name__), "architecture.settings": _digest(settings)}


def open_clip_identity(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return architecture and tokenizer of a folder that open_clip has read already."""
    import open_clip

    text = (folder / "open_clip_config.json").read_text(encoding="utf-8")
    config = json.loads(text).get("model_cfg")
    known = (name for name in open_clip.list_models() if open_clip.get_model_config(name) == config)
    files = sorted(f for f in folder.iterdir() if f.name.startswith(_TOKENIZER) and f.is_file())
    tokenizer = {"tokenizer": _digest({f.name: sha256(f) for f in files})} if files else {}
    return {"model": next(known, type(model).__name__), "architecture.settings": _digest(config), **tokenizer}


def settings_identity(settings: object, model: nn.Module) -> dict[str, Any]:
    """Return what a model is that was made from a dataclass of settings in a file."""
    return {"model": type(model).__name__, "architecture.settings": _digest(repr(settings))}


def _digest(settings: object) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
