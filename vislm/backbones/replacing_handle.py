"""What a replacement of attentions did to a model, and how to take it back."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from vislm.backbones.replacing_adoption import REMARKS
from vislm.backbones.replacing_host import GridOfTokens, ReplacedAttention, exchange
from vislm.backbones.replacing_towers import Tower


class Replacement:
    """What :func:`vislm.replace_attention` did, and how to take it back.

    Attributes:
        layers: the layers whose attention was replaced.
        kept: names in the model of the original's parameters that go on.
        unused: names of those that stay in the state dict without a use; they get no gradient.
        new: names of the parameters that were added.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        layers: range,
        made: Sequence[tuple[nn.Module, ReplacedAttention]],
        grid: GridOfTokens,
    ) -> None:
        self.layers, self._tower, self._made = layers, tower, list(made)
        self._hook = tower.embedding.register_forward_hook(grid)
        for index, (_, host) in zip(layers, made, strict=True):
            tower.put_attention(index, host)
        hosts = {host: path for path, host in model.named_modules() if isinstance(host, ReplacedAttention)}
        self.kept, self.unused, self.new = list[str](), list[str](), list[str]()
        for _, host in made:
            for name, _ in host.named_parameters():
                kind = self.new if name.startswith("mixer.") else self.unused if name in host.unused else self.kept
                kind.append(f"{hosts[host]}.{name}")
        self._names = list(dict.fromkeys(host.attention for _, host in made))

    def __str__(self) -> str:
        """Return what was kept and what is new, for people."""
        lines = [f"{' and '.join(self._names)} in layers {self.layers[0]} to {self.layers[-1]}"]
        for kind in ("kept", "unused", "new"):
            kinds = dict.fromkeys(".".join(name.split(".attn.")[-1:]) for name in getattr(self, kind))
            if kinds:
                lines.append(f"  {kind}: {', '.join(kinds)}")
        lines += [f"  {name}: {REMARKS[name]}" for name in self._names if name in REMARKS]
        return "\n".join(lines)

    def undo(self) -> None:
        """Put the original attentions back, with the projections as they are now."""
        self._hook.remove()
        for index, (original, host) in zip(self.layers, self._made, strict=False):
            exchange(host, original)
            original.train(host.training)
            self._tower.put_attention(index, original)
        self._made.clear()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
