"""The two branches of a transformer block, apart, so that tokens can be merged between them.

timm and open_clip write a block's forward as one expression; here each class that they build plain vision transformers
from is named with its branches. The modules, and with them LayerScale, stochastic depth and norms, are the block's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from vislm.backbones.replacing_forms import class_name
from vislm.errors import UsageError

Attend = Callable[[Tensor], Tensor]


class Branches(NamedTuple):
    """What a block adds to its tokens ``(B, N, C)``: first ``attention(block, x, attend)``, then ``mlp(block, x)``."""

    attention: Callable[[Any, Tensor, Attend], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


BRANCHES = {
    "timm.models.vision_transformer.Block": Branches(
        lambda block, x, attend: block.drop_path1(block.ls1(attend(block.norm1(x)))),
        lambda block, x: block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
    ),
    "timm.models.vision_transformer.ResPostBlock": Branches(
        lambda block, x, attend: block.drop_path1(block.norm1(attend(x))),
        lambda block, x: block.drop_path2(block.norm2(block.mlp(x))),
    ),
    "timm.models.eva.EvaBlock": Branches(
        lambda block, x, attend: block.drop_path1(_scaled(block.gamma_1, attend(block.norm1(x)))),
        lambda block, x: block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(x)))),
    ),
    "timm.models.eva.EvaBlockPostNorm": Branches(
        lambda block, x, attend: block.drop_path1(block.norm1(attend(x))),
        lambda block, x: block.drop_path2(block.norm2(block.mlp(x))),
    ),
    "open_clip.transformer.ResidualAttentionBlock": Branches(
        lambda block, x, attend: block.ls_1(attend(block.ln_1(x))),
        lambda block, x: block.ls_2(block.mlp(block.ln_2(x))),
    ),
    "open_clip.transformer.CustomResidualAttentionBlock": Branches(
        lambda block, x, attend: block.ls_1(block.ln_attn(attend(block.ln_1(x)))),
        lambda block, x: block.ls_2(block.mlp(block.ln_2(x))),
    ),
}
"""Full name of a block's class -> its branches."""


def branches_of(block: nn.Module, path: str) -> Branches:
    """Return the branches of a block; raise ``UsageError`` for one without a place between attention and MLP."""
    if class_name(block) not in BRANCHES:
        raise UsageError(
            f"{path} is a {class_name(block)}; tokens are merged between attention and MLP of {', '.join(BRANCHES)}"
        )
    if not getattr(getattr(block, "attn", None), "batch_first", True):
        raise UsageError(f"{path} takes tokens as (N, B, C); build the model with batch_first=True")
    return BRANCHES[class_name(block)]
