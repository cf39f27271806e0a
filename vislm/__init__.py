"""vislm: attention in vision transformers and large multimodal models.

Names are loaded on first use, so that ``import vislm`` costs nothing that is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "attend": "vislm.kernels",
    "explain": "vislm.kernels",
    "load_lmm": "vislm.lmm.model",
    "LMM": "vislm.lmm.model",
    "Answer": "vislm.lmm.model",
    "attach": "vislm.lmm.session",
    "load_image": "vislm.images",
    "create_model": "vislm.backbones.factory",
    "list_models": "vislm.backbones.variants",
    "from_official": "vislm.backbones.official",
    "register_timm": "vislm.backbones.timm_names",
    "replace_attention": "vislm.backbones.replacing",
    "attention_of": "vislm.backbones.replacing",
    "FlowCut": "vislm.token_pruning.flowcut",
    "FastV": "vislm.token_pruning.fastv",
    "RandomPruning": "vislm.token_pruning.random",
    "VHR": "vislm.heads.vhr",
}

__all__ = [
    "LMM",
    "VHR",
    "Answer",
    "FastV",
    "FlowCut",
    "RandomPruning",
    "__version__",
    "attach",
    "attend",
    "attention_of",
    "create_model",
    "explain",
    "from_official",
    "list_models",
    "load_image",
    "load_lmm",
    "register_timm",
    "replace_attention",
]

if TYPE_CHECKING:
    from vislm.backbones.factory import create_model
    from vislm.backbones.official import from_official
    from vislm.backbones.replacing import attention_of, replace_attention
    from vislm.backbones.timm_names import register_timm
    from vislm.backbones.variants import list_models
    from vislm.heads.vhr import VHR
    from vislm.images import load_image
    from vislm.kernels import attend, explain
    from vislm.lmm.model import LMM, Answer, load_lmm
    from vislm.lmm.session import attach
    from vislm.token_pruning.fastv import FastV
    from vislm.token_pruning.flowcut import FlowCut
    from vislm.token_pruning.random import RandomPruning


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'vislm' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
