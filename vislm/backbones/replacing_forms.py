"""How timm and open_clip keep the projections of an attention: from tokens to heads, and from heads to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from vislm.attention.tokens import merge_heads, split_heads
from vislm.backbones.replacing_beit import BeitForm
from vislm.errors import UsageError


class Form(Protocol):
    """The two ends of an attention. ``host`` has the parameters and modules of the original under their names."""

    num_heads: int
    width: int
    attn_drop: float

    def project(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """Return ``[q | k | v]``, ``(B, N, 3 C)``, normalised and rotated, for tokens ``(B, N, C)``."""
        ...

    def finish(self, host: Any, attended: Tensor, x: Tensor) -> Tensor:
        """Return the output ``(B, N, C)`` of merged heads ``(B, N, C)``; x is what the attention was given."""
        ...


class TimmForm:
    """``timm.layers.Attention``, ``AttentionRope`` and ``timm.models.eva.EvaAttention``."""

    def __init__(self, original: Any) -> None:
        self.num_heads, self.attn_drop = original.num_heads, original.attn_drop.p
        self.groups = getattr(original, "num_kv_groups", 1)
        self.num_prefix_tokens = getattr(original, "num_prefix_tokens", 0)
        self.rotates_halves = getattr(original, "rotate_half", False)
        self.width = original.num_heads * original.head_dim

    def project(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """See :meth:`Form.project`."""
        if getattr(host, "qkv", None) is not None:
            joint = host.qkv(x)
            if getattr(host, "q_bias", None) is not None:
                joint = joint + torch.cat((host.q_bias, host.k_bias, host.v_bias))
            query, key, value = (split_heads(part, self.num_heads) for part in joint.chunk(3, dim=-1))
        else:
            query = split_heads(host.q_proj(x), self.num_heads)
            key, value = (split_heads(part(x), self.num_heads // self.groups) for part in (host.k_proj, host.v_proj))
        query, key = self._turned(host.q_norm(query), rope), self._turned(host.k_norm(key), rope)
        if self.groups > 1:
            key, value = (tensor.repeat_interleave(self.groups, dim=1) for tensor in (key, value))
        return torch.cat([merge_heads(part.to(value.dtype)) for part in (query, key, value)], dim=-1)

    def finish(self, host: Any, attended: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Form.finish`."""
        attended = host.norm(attended)
        if getattr(host, "gate", None) is not None:
            attended = attended * host.gate(x).sigmoid()
        return host.proj_drop(host.proj(attended))

    def _turned(self, heads: Tensor, rope: Tensor | None) -> Tensor:
        """Return heads ``(B, H, N, D)`` rotated by their positions, prefix tokens as they are."""
        if rope is None:
            return heads
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        num_prefix = heads.shape[2] - rope.shape[-2]
        if num_prefix not in (0, self.num_prefix_tokens):
            raise UsageError(
                f"the model has rotary positions of {rope.shape[-2]} tokens, but the attention pads them to "
                f"{heads.shape[2] - self.num_prefix_tokens}; choose a window that divides the grid"
            )
        prefix, patches = heads[:, :, :num_prefix], heads[:, :, num_prefix:]
        return torch.cat((prefix, apply_rot_embed_cat(patches, rope, half=self.rotates_halves)), dim=2)


class JointForm:
    """``torch.nn.MultiheadAttention`` and ``open_clip.transformer.Attention``: one ``in_proj_weight``."""

    def __init__(self, original: Any) -> None:
        self.num_heads = original.num_heads
        self.attn_drop = original.dropout if isinstance(original, nn.MultiheadAttention) else original.attn_drop.p
        self.width = original.out_proj.in_features
        self.scaled_cosine = getattr(original, "scaled_cosine", False)
        self.largest_scale = getattr(original, "logit_scale_max", 0.0)

    def project(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """See :meth:`Form.project`."""
        joint = linear(x, host.in_proj_weight, host.in_proj_bias)
        if not hasattr(host, "ln_q"):
            return joint
        query, key, value = joint.chunk(3, dim=-1)
        query, key = (split_heads(part, self.num_heads) for part in (query, key))
        if self.scaled_cosine:  # as queries of which the factor head_dim ** -0.5 leaves the scaled cosine
            factor = host.logit_scale.clamp(max=self.largest_scale).exp() * query.shape[-1] ** 0.5
            query, key = normalize(query, dim=-1) * factor, normalize(key, dim=-1)
        else:
            query, key = host.ln_q(query), host.ln_k(key)
        return torch.cat((merge_heads(query), merge_heads(key), value), dim=-1)

    def finish(self, host: Any, attended: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Form.finish`."""
        if getattr(host, "head_scale", None) is not None:
            attended = merge_heads(split_heads(attended, self.num_heads) * host.head_scale)
        if hasattr(host, "ln_inner"):
            return host.out_drop(host.out_proj(host.ln_inner(attended)))
        return host.out_proj(attended)


FORMS: dict[str, Callable[[Any], Form]] = {
    "timm.layers.attention.Attention": TimmForm,
    "timm.layers.attention.AttentionRope": TimmForm,
    "timm.models.eva.EvaAttention": TimmForm,
    "timm.models.beit.Attention": BeitForm,
    "torch.nn.modules.activation.MultiheadAttention": JointForm,
    "open_clip.transformer.Attention": JointForm,
}
"""Full name of a plain softmax attention's class -> its form."""


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def form_of(original: nn.Module, path: str) -> Form:
    """Return the form of an attention; raise ``UsageError`` for one whose weights have no place in another.

    Args:
        original: the module.
        path: its name, for the error.
    """
    if class_name(original) not in FORMS:
        raise UsageError(
            f"{path} is a {class_name(original)}, which computes more than a softmax of q k^T by heads; expected one "
            f"of {', '.join(FORMS)}; choose layers without it"
        )
    obstacle = _obstacle(original)
    if obstacle is not None:
        raise UsageError(f"{path} {obstacle}, which no other attention can take over")
    return FORMS[class_name(original)](original)


def _obstacle(original: Any) -> str | None:
    """Return what of an attention does not fit a softmax of q k^T by heads of width C / H; None = it fits."""
    if isinstance(original, nn.MultiheadAttention):
        if original.in_proj_weight is None or original.bias_k is not None or original.add_zero_attn:
            return "has keys or values of its own (kdim, vdim, bias_k or add_zero_attn)"
    elif hasattr(original, "proj"):
        dims = original.proj.out_features, original.proj.in_features
        if dims[0] != dims[1]:
            return f"has heads of {dims[1]} channels together for tokens of {dims[0]}"
    return None
