"""Names for the keys of a prompt: its beginning, text before, between and after images, images, the answer, padding."""

from __future__ import annotations

from torch import Tensor

from vislm.lmm.decoder.key_groups import KeyGroups

GROUPS = ("bos", "system", "text_before", "image", "text_between", "text_after", "generated", "pad")
"""In prompt order; every key is in exactly one."""


def named_groups(keys: KeyGroups, system: int = 0) -> dict[str, Tensor]:
    """Return name -> (B, K) bool; the groups cover all keys and do not overlap.

    Args:
        keys: of one decoder layer.
        system: valid tokens behind the first one that are a system prompt; nothing in the ids says so.
    """
    place = keys.valid.cumsum(-1) - 1
    bos = keys.valid & (place == 0) & ~keys.image
    generated = keys.generated & ~keys.image
    before = keys.before & ~bos & ~generated
    in_system = before & (place <= system)
    after = keys.after & ~generated & ~bos
    known = bos | generated | before | after | keys.image
    return {
        "bos": bos,
        "system": in_system,
        "text_before": before & ~in_system,
        "image": keys.image,
        "text_between": keys.valid & ~known,
        "text_after": after,
        "generated": generated,
        "pad": ~keys.valid,
    }
