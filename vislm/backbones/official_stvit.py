"""STViT's official names."""

from __future__ import annotations

import re

MARKER = re.compile(r"\bstoken_refine\.")
"""Is in the names of every STViT, and of nothing else."""

UNUSED = re.compile(r"\b(?:un)?fold\.weights$")
"""Constant kernels of the official way to compute the association."""

RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.pos_embed\.conv\.", ".pos_embed."),
    (r"\.norm1\.norm\.", ".norm1."),
    (r"\.mlp2\.conv\.conv\.", ".mlp.dwconv."),
    (r"\.mlp2\.", ".mlp."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.downsample\.proj\.0\.", ".downsample.proj."),
    (r"\.downsample\.proj\.1\.", ".downsample.norm."),
    (r"^proj\.", "norm.proj."),
)
"""Official name (regular expression) -> ours, behind the names that all families share."""
