"""The module that stands where another attention stood: the other's projections around an attention of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vislm.attention.super_token import SuperTokenAttention
from vislm.backbones.replacing_forms import Form
from vislm.errors import UsageError


class GridOfTokens:
    """Hears the patch embedding and remembers the last grid of patches."""

    def __init__(self) -> None:
        self.sizes: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Take note of the sides of the embedding's map ``(B, C, H, W)``; a forward hook."""
        self.sizes = (int(output.shape[2]), int(output.shape[3]))


class ReplacedAttention(nn.Module):
    """An attention in place of another one, whose parameters it keeps under their names.

    Attributes:
        attention: name of the attention.
        mixer: the attention, without projections of its own; what it adds to the state dict.
    """

    def __init__(self, original: nn.Module, form: Form, attention: str, mixer: nn.Module, grid: GridOfTokens) -> None:
        super().__init__()
        self.attention, self.form, self.grid = attention, form, grid
        self._rope: Tensor | None = None
        exchange(original, self)
        self.mixer = mixer
        _plug(mixer, attention, self._projected)
        self.train(original.training)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            rope: the model's rotary positions.
            attn_mask: has to be None.
            is_causal: has to be False.

        Raises:
            UsageError: a mask, or an attention that no patch embedding went before.
        """
        if attn_mask is not None or is_causal:
            raise UsageError(f"attention was replaced by {self.attention}, which takes no mask; undo the replacement")
        if self.grid.sizes is None:
            raise UsageError("the grid of patches is not known; call the whole model, not a block of it alone")
        self._rope = rope
        try:
            attended = self.mixer(x, self.grid.sizes)
        finally:
            self._rope = None
        return self.form.finish(self, attended, x)

    def _projected(self, x: Tensor) -> Tensor:
        return self.form.project(self, x, self._rope)


class ReplacedMultihead(ReplacedAttention):
    """The same in place of ``torch.nn.MultiheadAttention``."""

    def __init__(self, original: nn.MultiheadAttention, *others: Any) -> None:
        super().__init__(original, *others)
        self.batch_first = original.batch_first

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the signature of the module it stands for
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the output, and None for the weights; query, key and value have to be the same tensor."""
        if need_weights or key is not query or value is not query:
            raise UsageError(f"attention was replaced by {self.attention}: self-attention without returned weights")
        x = query if self.batch_first else query.transpose(0, 1)
        x = super().forward(x, attn_mask=attn_mask)
        return (x if self.batch_first else x.transpose(0, 1)), None


def exchange(source: nn.Module, target: nn.Module) -> None:
    """Give the target all parameters, buffers and modules of the source, but for a ``mixer``."""
    for name, parameter in source._parameters.items():
        target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        if name != "mixer":
            target.add_module(name, child)


def _plug(mixer: nn.Module, attention: str, project: Any) -> None:
    """Let an attention project by a function, and leave its output projection to the host."""
    owner: Any = mixer
    if isinstance(mixer, SuperTokenAttention) and mixer.refine == "attention":
        owner = mixer.stoken_refine
        heads = mixer.num_heads
        project = _ByHead(project, heads)
    if not (hasattr(owner, "qkv") and hasattr(owner, "proj")):
        raise UsageError(
            f"{attention} with these options has no joint projection qkv that the weights of another attention fit"
        )
    del owner.qkv
    owner.qkv = project  # no module: its parameters are the host's
    owner.proj = nn.Identity()


class _ByHead:
    """A projection whose rows are grouped by head: ``[q_0 k_0 v_0 | q_1 k_1 v_1 | ..]``."""

    def __init__(self, project: Any, num_heads: int) -> None:
        self.project, self.num_heads = project, num_heads

    def __call__(self, x: Tensor) -> Tensor:
        return self.project(x).unflatten(-1, (3, self.num_heads, -1)).transpose(2, 3).flatten(2)
