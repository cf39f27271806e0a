"""Token merging inside the vision transformers of timm and open_clip, while a handle is open."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.tokens import merge_heads, split_heads
from vislm.backbones.replacing_forms import FORMS, JointForm, TimmForm, class_name, form_of
from vislm.backbones.replacing_towers import tower_of
from vislm.errors import UsageError
from vislm.kernels import Dense, attend, gather_tokens
from vislm.kernels.matching import bipartite_soft_matching, source_matrix
from vislm.token_pruning.tome.blocks import branches_of
from vislm.token_pruning.tome.schedule import merge_schedule


class Groups(NamedTuple):
    """Which of N tokens are one by now, n of them left.

    Attributes:
        sizes: ``(B, n)`` float32, tokens that each stands for; None while nothing is merged.
        source: ``(B, N)``, the place of the token that each is part of.
        home: ``(B, n)``, the place in ``[0, N)`` of the token that the others of its group were merged into.
    """

    sizes: Tensor | None
    source: Tensor
    home: Tensor


def merging(
    model: nn.Module, r: int | tuple[int, float] | list[int], *, prop_attn: bool = True, weighted_pool: bool = True
) -> Merging:
    """Merge similar tokens in every block of a vision transformer, between attention and MLP, without training.

    In each block the ``r`` tokens most similar to another one (cosine of their keys, averaged over heads) become one
    with it, as the mean weighted by the tokens that each stands for. Prefix tokens (class, distillation, registers) are
    never merged. Works in training too: gradients flow through the merged tokens.

    Args:
        model: a timm vision transformer (ViT, DeiT, EVA, SigLIP, DINOv2 ..), the visual tower of an open_clip model, or
            the open_clip model around it. With rotary positions a merged token keeps that of the token it grew from.
        r: tokens to merge per block; ``(r, inflection)`` for a number that changes linearly, as ``(r, -1.0)`` for a
            decreasing one; or a list with one number per block. At most half of the tokens merge in a block.
        prop_attn: proportional attention: a key that stands for s tokens counts s times. The paper recommends it
            off the shelf, and not for MAE models.
        weighted_pool: let the pooling see every original token, so that a mean counts a merged token s times. The
            official code for timm takes the plain mean over merged tokens; off gives that.

    Returns:
        A handle that shows what was merged and puts the original back: ``undo()``, or at the end of
        ``with merging(vit, r=13):``. Parameters and their names are untouched.

    Raises:
        UsageError: a model or block that is not as timm or open_clip build them, a wrong ``r``, or merging twice.

    Source: ToMe (ICLR 2023, arXiv 2210.09461); https://github.com/facebookresearch/ToMe.
    """
    return Merging(model, r, prop_attn, weighted_pool)


class Merging:
    """What :func:`merging` did; describes the last forward.

    Attributes:
        schedule: tokens that each block is asked to merge.
    """

    def __init__(self, model: nn.Module, r: Any, prop_attn: bool, weighted_pool: bool) -> None:
        tower = tower_of(model)
        self.schedule, self.prop_attn = merge_schedule(r, len(tower.blocks)), prop_attn
        self._prefix = tower.num_prefix_tokens
        self._groups: dict[int, Groups] = {}
        parts = [_Block(block, f"block {number}") for number, block in enumerate(tower.blocks)]
        self._swapped: list[tuple[nn.Module, str, Callable | None]] = []
        self._hook = tower.embedding.register_forward_hook(lambda *_: self._groups.clear())
        for number, part in enumerate(parts):
            self._swap(part.block, "forward", functools.partial(self._forward, number, part))
        for name in ("visual", "trunk"):
            model = getattr(model, name, model)
        for name in ("pool", "_pool"):  # timm's, open_clip's
            if weighted_pool and callable(getattr(model, name, None)):
                self._swap(model, name, functools.partial(self._pool, getattr(model, name)))

    def undo(self) -> None:
        """Put everything back as it was; the record of the last forward stays."""
        self._hook.remove()
        for module, name, before in self._swapped:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        self._swapped.clear()

    def __enter__(self) -> Merging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    # -- the last forward ----------------------------------------------------------------------------------------------
    @property
    def tokens(self) -> list[int]:
        """Tokens that entered each block, and behind them those that left the last one; prefix tokens included."""
        return [self._groups[number].home.shape[1] for number in sorted(self._groups)]

    @property
    def sizes(self) -> Tensor:
        """``(B, n)`` float32: tokens that each of the last block's tokens stands for."""
        groups = self._last()
        return torch.ones_like(groups.home, dtype=torch.float32) if groups.sizes is None else groups.sizes

    @property
    def source(self) -> Tensor:
        """``(B, N)``: the place in ``[0, n)`` of the token that each token of the first block is part of."""
        return self._last().source

    def source_matrix(self) -> Tensor:
        """Return ``(B, n, N)`` in float32: 1 where a token of the first block is part of a merged token."""
        return source_matrix(self.source, self._last().home.shape[1])

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Return ``(B, N, C)``: every token of the first block gets what ``(B, n, C)`` holds for its group."""
        return gather_tokens(tokens, self.source)

    def _last(self) -> Groups:
        if not self._groups:
            raise UsageError("nothing was merged yet: run the model first")
        return self._groups[max(self._groups)]

    # -- in place of the model's own methods ---------------------------------------------------------------------------
    def _swap(self, module: nn.Module, name: str, method: Callable) -> None:
        self._swapped.append((module, name, module.__dict__.get(name)))
        setattr(module, name, method)

    def _pool(self, original: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._groups and self._last().sizes is not None and x.shape[1] == self._last().home.shape[1]:
            x = self.unmerge(x)
        return original(x, *args, **kwargs)

    def _forward(self, number: int, part: _Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a block. What enters it is kept by number, so that checkpointing can run it again."""
        if number == 0:
            everyone = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            self._groups[0] = Groups(None, everyone, everyone)
        elif number not in self._groups:
            raise UsageError("call the whole model, not a block of it alone, while its tokens are merged")
        groups, r = self._groups[number], self.schedule[number]
        if groups.sizes is None and r == 0:
            self._groups[number + 1] = groups
            return part.original(x, *args, **kwargs)
        rope = part.rope(args, kwargs)
        if rope is not None and groups.sizes is not None:
            rope = _rope_at(rope, groups)
        x, metric = part.attend(x, rope, groups.sizes if self.prop_attn else None)
        prefix = self._prefix
        matching = bipartite_soft_matching(
            metric, r, class_token=prefix > 0, distill_token=prefix > 1, registers=max(0, prefix - 2)
        )
        if matching.num_tokens < x.shape[1]:
            x, sizes = matching.merge(x, groups.sizes)
            source, home = matching.index.gather(1, groups.source), groups.home.gather(1, matching.kept)
            groups = Groups(sizes, source, home)
        self._groups[number + 1] = groups
        return x + part.branches.mlp(part.block, x)


class _Block:
    """A block of the model, and what is needed to run its attention by ours."""

    def __init__(self, block: nn.Module, path: str) -> None:
        ahead = getattr(block.__dict__.get("forward"), "func", None)
        if isinstance(getattr(ahead, "__self__", None), Merging):
            raise UsageError(f"the tokens of {path} are merged already; call undo() of that handle first")
        self.block, self.branches = block, branches_of(block, path)
        self.attention: Any = block.get_submodule("attn")
        if FORMS.get(class_name(self.attention)) not in (TimmForm, JointForm):
            raise UsageError(f"{path} has a {class_name(self.attention)}, whose positions merged tokens do not have")
        self.form = form_of(self.attention, path)
        self.original = block.forward
        self._names = list(inspect.signature(block.forward).parameters)[1:]

    def rope(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the rotary positions of a call; raise ``UsageError`` if there is a mask."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rope = given.pop("rope", None)
        for name, argument in given.items():
            if argument is not None and argument is not False:
                raise UsageError(f"the block was given {name}; merged tokens have no mask, call undo() first")
        return rope

    def attend(self, x: Tensor, rope: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens behind the attention, ``(B, N, C)``, and what the matching compares, ``(B, N, D)``."""
        keys: list[Tensor] = []

        def attended(normed: Tensor) -> Tensor:
            joint = self.form.project(self.attention, normed, rope)
            query, key, value = (split_heads(part, self.form.num_heads) for part in joint.chunk(3, dim=-1))
            keys.append(key.detach())
            # In the dtype of the logits: a wider one would widen the whole attention.
            logits = None if sizes is None else sizes.log().to(query.dtype)
            if self.form.attn_drop and self.attention.training:
                bias = None if logits is None else logits[:, None, None]
                out = attend_dropping(query, key, value, self.form.attn_drop, pattern=Dense(), bias=bias)
            else:
                out = attend(query, key, value, key_logits=logits)
            return self.form.finish(self.attention, merge_heads(out), normed)

        x = x + self.branches.attention(self.block, x, attended)
        return x, keys[0].float().mean(1)


def _rope_at(rope: Tensor, groups: Groups) -> Tensor:
    """Return the rotary positions of merged tokens, ``(B, 1 or H, n, D)``.

    Args:
        rope: ``(N, D)``, ``(H, N, D)`` or ``(B, 1 or H, N, D)``, of all tokens or of those behind the prefix.
        groups: which tokens are left.
    """
    ahead = groups.source.shape[1] - rope.shape[-2]
    places = groups.home[:, ahead:] - ahead
    if rope.ndim == 2:
        return rope[places].unsqueeze(1)
    if rope.ndim == 3:
        return rope[:, places].transpose(0, 1)
    return rope.gather(2, places[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
