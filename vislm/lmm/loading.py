"""Finding and loading checkpoints: safetensors only, no remote code, no network unless a hub model is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from vislm.errors import CheckpointError, UsageError
from vislm.files import sha256
from vislm.lmm.adapters import FAMILIES

EMBEDDED = {"vislm-tiny": Path(__file__).parent.parent / "assets" / "vislm_tiny"}
"""Models that ship with the package."""


def load_pretrained(
    name: str, dtype: torch.dtype | str | None, device: torch.device
) -> tuple[PreTrainedModel, Any, dict[str, str]]:
    """Return model (eval mode), processor and identity {"model", "weights"} of an image-text checkpoint."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = EMBEDDED.get(name, Path(name))
    local = folder.is_dir()
    source = str(folder) if local else name
    weights = _check_folder(folder) if local else _check_hub_name(name)
    precision = torch.float32 if name in EMBEDDED and dtype is None else _dtype(dtype)
    try:
        if local:
            transformers.logging.disable_progress_bar()  # nothing is downloaded; loading takes a moment
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=precision,
            use_safetensors=True,
            attn_implementation="sdpa",
            local_files_only=local,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {name!r}: {error}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise CheckpointError(f"{name!r} lacks {len(missing)} of the model's weights, such as {missing[0]}")
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
    return model, processor, {"model": name, "weights": weights}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise UsageError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        return found
    return "auto" if dtype is None else dtype


def _check_folder(folder: Path) -> str:
    """Return the hash of a local checkpoint's weights after checking that it is one that we can load."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give a folder written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if "vision_config" not in config:
        raise CheckpointError(
            f"{folder} is a text-only checkpoint (model_type {config.get('model_type')!r}, no vision_config); vislm "
            f"needs an image-text model of a family in {sorted(FAMILIES)}"
        )
    if config.get("model_type") not in FAMILIES:
        raise UsageError(f"no adapter for the family {config.get('model_type')!r}; available: {sorted(FAMILIES)}")
    tensors = sorted(folder.glob("*.safetensors"))
    if not tensors:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        found = f"only pickle files ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise CheckpointError(
            f"{folder} holds {found}; convert it once with model.save_pretrained(..., safe_serialization=True)"
        )
    return "+".join(sha256(p)[:16] for p in tensors)


def _check_hub_name(name: str) -> str:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no model {name!r}: it is neither embedded ({', '.join(EMBEDDED)}), nor a local folder, nor a hub name "
            "such as 'llava-hf/llava-1.5-7b-hf'"
        )
    return f"hub:{name}"
