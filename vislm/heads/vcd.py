"""VCD: move the next-token logits away from those that the model gives for the same image under noise.

Source: Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding", CVPR 2024, arXiv 2311.16922; github.com/DAMO-NLP-SG/VCD. The official code acts only where tokens are
sampled; here greedy decoding and beam search are contrasted too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import LogitsStage, LogitsView

NOISE_STEPS = 1000


def signal_share(step: int) -> float:
    """Return abar_t, the share of an image's variance that is left after ``step`` (0..999) of the diffusion's steps.

    abar_t = prod (1 - beta), beta = sigmoid(linspace(-6, 6, 1000)) (0.005 - 1e-5) + 1e-5.
    """
    betas = torch.linspace(-6.0, 6.0, NOISE_STEPS).sigmoid() * (0.005 - 1e-5) + 1e-5
    return (1.0 - betas).cumprod(0)[step].item()


def add_noise(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """Return sqrt(abar_t) x + sqrt(1 - abar_t) eps of normalised pixels and standard normal noise, in float32."""
    share = signal_share(step)
    return math.sqrt(share) * pixels.float() + math.sqrt(1.0 - share) * noise.float()


def contrast(logits: Tensor, distorted_logits: Tensor, alpha: float, beta: float) -> Tensor:
    """Return (1 + alpha) l - alpha l', with -inf where l lies below max(l) + ln(beta).

    Args:
        logits: (..., V) for the image.
        distorted_logits: (..., V) for the noised image.
        alpha: strength of the contrast.
        beta: share of the largest probability that a token needs; 0 admits all.
    """
    mixed = (1.0 + alpha) * logits - alpha * distorted_logits
    if beta == 0.0:
        return mixed
    least = logits.max(-1, keepdim=True).values + math.log(beta)
    return mixed.masked_fill(logits < least, -torch.inf)


def noise_for(pixels: Tensor, seed: int) -> Tensor:
    """Return standard normal noise that depends on the pixels and the seed alone, so that any batch gives the same.

    Args:
        pixels: a crop (C, H, W), or an image (n, C, T, P, P) of n patches. A still image fed as T equal frames has
            equal noise in them.
        seed: of the generator, beside the content.
    """
    content = zlib.crc32(pixels.detach().float().cpu().contiguous().numpy().tobytes())
    generator = torch.Generator().manual_seed(seed + content)
    shape = pixels.shape
    if pixels.dim() == 5 and bool((pixels == pixels[:, :, :1]).all()):
        shape = torch.Size((*shape[:2], 1, *shape[3:]))
    return torch.randn(shape, generator=generator).expand(pixels.shape).to(pixels.device)


@dataclass(frozen=True)
class VCD:
    """Contrast with a second run of the model on noised images."""

    alpha: float = 1.0
    """Strength; 0 leaves the model alone, cutoff included."""
    beta: float = 0.1
    """Tokens less likely than this share of the likeliest are ruled out."""
    noise_step: int = 500
    """Step 0..999 of the noise schedule."""
    seed: int = 0
    name = "vcd"

    def plan(self, adapter: Adapter) -> Sequence[LogitsStage]:
        """Return one logits stage; none when alpha is 0."""
        if not 0.0 <= self.alpha < math.inf or not 0.0 <= self.beta <= 1.0:
            raise UsageError(f"alpha={self.alpha}, beta={self.beta}: expected alpha >= 0 (0: off) and beta in [0, 1]")
        if not 0 <= self.noise_step < NOISE_STEPS:
            raise UsageError(f"noise_step={self.noise_step}: expected 0..{NOISE_STEPS - 1}")
        if self.alpha == 0.0:
            return []
        return [LogitsStage(self._adjust, contrast="pixels", pixels=self._distort)]

    def _distort(self, pixels: Tensor, memory: dict[str, Any]) -> Tensor:
        return add_noise(pixels, noise_for(pixels, self.seed), self.noise_step).to(pixels.dtype)

    def _adjust(self, view: LogitsView) -> Tensor:
        assert view.contrast is not None
        return contrast(view.logits, view.contrast, self.alpha, self.beta)


METHOD = VCD
