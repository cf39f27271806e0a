"""Where each model family keeps its vision tower, projector, image tokens and decoder layers.

One small class per family. ``adapter_for(model)`` picks it by the model's ``config.model_type``; a new family is one
file and one row of the table.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vislm.errors import UsageError
from vislm.lmm.adapters.base import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "Adapter", "adapter_for"]

FAMILIES = {
    "llava": "vislm.lmm.adapters.llava:LlavaAdapter",
    "llava_next": "vislm.lmm.adapters.llava_next:LlavaNextAdapter",
    "llava_onevision": "vislm.lmm.adapters.llava_onevision:LlavaOnevisionAdapter",
    "qwen2_vl": "vislm.lmm.adapters.qwen2_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "vislm.lmm.adapters.qwen2_5_vl:Qwen25VLAdapter",
    "qwen3_vl": "vislm.lmm.adapters.qwen3_vl:Qwen3VLAdapter",
    "internvl": "vislm.lmm.adapters.internvl:InternVLAdapter",
    "idefics3": "vislm.lmm.adapters.idefics3:Idefics3Adapter",
    "smolvlm": "vislm.lmm.adapters.smolvlm:SmolVLMAdapter",
}
"""transformers ``model_type`` -> adapter."""


def adapter_for(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a transformers image-text model.

    Raises:
        UsageError: the model has no images, or its family has no adapter yet.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind in FAMILIES:
        module, name = FAMILIES[kind].split(":")
        return getattr(import_module(module), name)(model)
    if not hasattr(model.config, "vision_config"):
        raise UsageError(
            f"{type(model).__name__} ({kind}) is a model without images; give an image-text model of a family in "
            f"{sorted(FAMILIES)}"
        )
    raise UsageError(f"no adapter for the family {kind!r}; available: {sorted(FAMILIES)}")
