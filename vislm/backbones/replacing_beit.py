"""BEiT's attention: a table of logits by relative position, with three entries for the class token.

Source: BEiT (arXiv 2106.08254); ``timm.models.beit``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.neighborhood import NeighborhoodAttention
from vislm.attention.window import WindowAttention
from vislm.backbones.replacing_host import ReplacedAttention

TABLE = "relative_position_bias_table"


class BeitForm:
    """``timm.models.beit.Attention``; see :class:`vislm.backbones.replacing_forms.Form`."""

    def __init__(self, original: Any) -> None:
        self.num_heads, self.attn_drop = original.num_heads, original.attn_drop.p
        self.width = original.proj.in_features
        self.window = original.window_size

    def project(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """See :meth:`Form.project`."""
        joint = host.qkv(x)
        return joint if host.q_bias is None else joint + torch.cat((host.q_bias, host.k_bias, host.v_bias))

    def finish(self, host: Any, attended: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Form.finish`."""
        return host.proj_drop(host.proj(attended))


class ReplacedBeit(ReplacedAttention):
    """The same in place of ``timm.models.beit.Attention``; its table goes on as that of windows and neighborhoods."""

    form: BeitForm

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.places = _place_of_table(self.mixer)
        if self.places is not None:
            delattr(self.mixer, self.places)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters of the original without a use here."""
        table = getattr(self, TABLE, None)
        return (TABLE, *super().unused) if table is not None and self.places is None else super().unused

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the signature of the module it stands for
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        """Return the output ``(B, N, C)``; models whose layers share a bias are refused."""
        if self.places is None:
            return super().forward(x)
        mixer: Any = self.mixer
        try:
            setattr(mixer, self.places, self._table())
            if self.form.window is not None:
                to_tokens, to_prefix, own = getattr(self, TABLE)[-3:]
                mixer.prefix_logits = torch.stack((to_prefix, own - to_tokens))[..., None]
            return super().forward(x)
        finally:
            setattr(mixer, self.places, None)
            mixer.prefix_logits = None

    def _table(self) -> Tensor | None:
        if self.form.window is None:
            return None
        maps = getattr(self, TABLE)[:-3].t().unflatten(1, [2 * side - 1 for side in self.form.window])
        if isinstance(self.mixer, WindowAttention):
            return _central(maps, self.mixer.window_size, (1, 1)).flatten(1).t()
        assert isinstance(self.mixer, NeighborhoodAttention)
        return _central(maps, self.mixer.window_size, self.mixer.dilation).flip(1, 2)


def _place_of_table(mixer: nn.Module) -> str | None:
    """Return the name of an attention's own table, which the model's stands for; None without one."""
    if isinstance(mixer, WindowAttention) and mixer.relative_position_bias_table is not None:
        return TABLE
    if isinstance(mixer, NeighborhoodAttention) and mixer.rpb is not None:
        return "rpb"
    return None


def _central(maps: Tensor, window: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    """Return the entries of maps ``(H, 2 a - 1, 2 b - 1)`` up to ``window - 1`` steps from the middle, or zero."""
    for axis, (size, step) in enumerate(zip(window, steps, strict=True), start=1):
        middle, reach = maps.shape[axis] // 2, (size - 1) * step
        room = max(0, reach - middle)
        padded = pad(maps.movedim(axis, -1), (room, room))
        maps = padded[..., middle + room - reach : middle + room + reach + 1 : step].movedim(-1, axis)
    return maps
