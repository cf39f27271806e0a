"""What every backbone has: features, a classifier, timm's methods around both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.checkpointing import set_checkpointing
from vislm.backbones.config import BackboneConfig
from vislm.errors import UnknownName, UsageError

FORMATS = ("NCHW", "NLC")
LAST = 99999
FIRST_GROUP = r"^(?:stem|cls_token|reg_token|pos_embed)"
GROUPS = [
    (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.", None),
    (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
    (r"^stages\.(\d+)\.", (LAST,)),
    (r"^blocks\.(\d+)\.", None),
    (r"^(?:norm|final_conv)\.", (LAST,)),
]
COARSE_GROUPS = [(r"^(?:stages|blocks)\.(\d+)\.", None), (r"^(?:norm|final_conv)\.", (LAST,))]


class Backbone(nn.Module):
    """A classifier of images in stages; subclasses define ``stage_maps``, ``finish`` and ``macs``.

    Attributes:
        config: what it was built from.
        num_features: width C behind the last stage.
        num_classes: 0 = no classifier.
        feature_info: per stage its width ``num_chs``, pixels per token ``reduction``, and ``module`` name, for timm.
    """

    stages: nn.ModuleList
    head: nn.Module
    num_prefix_tokens = 0
    grad_checkpointing = False

    def __init__(self, config: BackboneConfig, num_features: int, reductions: Sequence[int]) -> None:
        super().__init__()
        self.config, self.num_features, self.num_classes = config, num_features, config.num_classes
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{index}"}
            for index, (stage, reduction) in enumerate(zip(config.stages, reductions, strict=True))
        ]

    @property
    def levels(self) -> nn.ModuleList:
        """The parts whose outputs are features: the stages, or a plain transformer's blocks."""
        return self.stages

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each stage's output ``(B, C_i, H_i, W_i)`` for images ``(B, 3, H, W)`` of any size."""
        raise NotImplementedError

    def finish(self, features: Tensor) -> Tensor:
        """Return the tokens ``(B, N, C)`` for the head from the last stage's map ``(B, C_i, H_i, W_i)``."""
        raise NotImplementedError

    def macs(self, input_size: Sequence[int] = (224, 224)) -> int:
        """Return the multiply-adds for one image: convolutions, linear maps and the products of attention."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens ``(B, N, C)`` that the head averages."""
        last = deque(self.stage_maps(images), maxlen=1).pop()  # no other stage's output stays in memory
        return self.finish(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``(B, classes)`` of the tokens ``(B, N, C)``, or with ``pre_logits`` their mean ``(B, C)``."""
        return self.head(x, pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)``, or the mean token ``(B, C)`` without a classifier."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages' outputs, in front of them (unless ``intermediates_only``) the tokens for the head.

        Args:
            images: ``(B, 3, H, W)``.
            indices: which stages, negative from the end; a number = the last so many; None = all.
            norm: finish the last stage's output as for the head.
            stop_early: compute no stage behind the last one wanted; only with ``intermediates_only``.
            output_fmt: ``"NCHW"`` or ``"NLC"``.
            intermediates_only: return the list alone.
        """
        if output_fmt not in FORMATS:
            raise UnknownName("output_fmt", output_fmt, FORMATS)
        wanted = self._level_indices(indices)
        outputs, tokens = dict[int, Tensor](), None
        for index, features in enumerate(self.stage_maps(images)):
            outputs[index] = features
            if intermediates_only and stop_early and index == max(wanted):
                break
        last = len(self.levels) - 1
        if not intermediates_only or (norm and last in wanted):
            tokens = self.finish(outputs[last])
        if norm and last in wanted and tokens is not None:
            outputs[last] = to_map(tokens, outputs[last].shape[2:])
        chosen = [outputs[index] if output_fmt == "NCHW" else to_tokens(outputs[index]) for index in wanted]
        return chosen if tokens is None or intermediates_only else (tokens, chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last one wanted, and the head; return the stages wanted, counted from 0."""
        wanted = self._level_indices(indices)
        del self.levels[max(wanted) + 1 :]
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def get_classifier(self) -> nn.Module:
        """Return the linear map of the classifier."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; ``global_pool`` is there for timm and must be ``"avg"`` or None."""
        if global_pool not in (None, "avg"):
            raise UsageError(f"{global_pool=}, expected 'avg': these backbones average the tokens")
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.head = Head(self.num_features, num_classes, self.config.drop_rate).to(weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass and keep nothing of their insides: less memory, more time."""
        set_checkpointing(self, enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions for timm: parameters by depth, for learning rates that fall layer by layer."""
        return {"stem": FIRST_GROUP, "blocks": COARSE_GROUPS if coarse else GROUPS}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay, beside biases and norms."""
        names = set[str]()
        for prefix, module in self.named_modules():
            own = getattr(module, "no_weight_decay", None)
            if module is not self and own is not None:
                names |= {f"{prefix}.{name}" for name in own()}
        return names & {name for name, _ in self.named_parameters()}

    def _level_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.levels)
        if indices is None or isinstance(indices, int):
            wanted = list(range(count - (count if indices is None else indices), count))
        else:
            wanted = [index + count if index < 0 else index for index in indices]
        if not wanted or not all(0 <= index < count for index in wanted):
            raise UsageError(f"{indices=}, expected stages from 0 to {count - 1}, or how many of the last {count}")
        return wanted


class Head(nn.Module):
    """Mean over tokens, dropout, one linear map ``fc`` (or none, for 0 classes)."""

    def __init__(self, num_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
        initialize(self)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``(B, classes)``, or with ``pre_logits`` the mean ``(B, C)`` of tokens ``(B, N, C)``."""
        x = self.drop(x.mean(dim=1))
        return x if pre_logits else self.fc(x)


class DropPath(nn.Module):
    """Drops the branch of whole samples in training, with what is left scaled up (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x ``(B, ...)`` with samples zeroed at random."""
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(x.shape[:1] + (1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1.0 - self.rate)

    def extra_repr(self) -> str:
        """Return the rate for ``print(module)``."""
        return f"rate={self.rate}"


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rates of all blocks: from 0, evenly up to the last block's."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def initialize(module: nn.Module) -> None:
    """Draw the linear maps inside: truncated normal with deviation 0.02, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialize_convolutions(module: nn.Module) -> None:
    """Draw the convolutions inside: normal with variance 2 / (kernel size * channels out / groups), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.weight[0, 0].numel() * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=(2.0 / fan_out) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
