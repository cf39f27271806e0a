"""Random attention problems, and the attention of the papers written out in float64 without any code of vislm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vislm.kernels import Causal, Dense, Masked, Padded, StatisticsRequest

sys.path.insert(0, str(Path(__file__).parent))  # attention_textbook and attention_cases


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; ``allowed`` is the pattern's mask, made by hand, ``(B, 1, Nq, Nk)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in another dtype, bias and key logits included."""
        options = {
            name: option.to(dtype) if isinstance(option, Tensor) else option for name, option in self.options.items()
        }
        return replace(
            self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype), options=options
        )

    def sample(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.query[index : index + 1], self.key[index : index + 1], self.value[index : index + 1]


def _pattern(name: str, batch: int, num_queries: int, num_keys: int, random: torch.Generator) -> tuple[Any, Tensor]:
    triangle = [[j <= i + num_keys - num_queries for j in range(num_keys)] for i in range(num_queries)]
    past = torch.tensor(triangle, dtype=torch.bool).view(num_queries, num_keys)
    everything = torch.ones(batch, 1, num_queries, num_keys, dtype=torch.bool)
    valid = torch.rand(batch, num_keys, generator=random) < 0.7
    valid[0, : num_keys // 2] = False  # left padding: with a causal mask the first queries see nothing
    scattered = torch.rand(batch, 1, num_queries, num_keys, generator=random) < 0.4
    scattered[:, :, num_queries // 2 : num_queries // 2 + 1] = False  # a slice: there may be no queries
    return {
        "dense": (Dense(), everything),
        "causal": (Causal(), everything & past),
        "padded": (Padded(valid), everything & valid[:, None, None]),
        "padded_causal": (Padded(valid, causal=True), everything & valid[:, None, None] & past),
        "masked": (Masked(scattered), scattered),
    }[name]


@pytest.fixture(scope="session")
def make() -> Callable[..., Problem]:
    """Build a seeded problem: ``make(pattern, batch=, heads=(Hq, Hkv), tokens=(Nq, Nk), dims=(D, Dv), extras=)``."""

    def build(
        pattern: str = "dense",
        *,
        batch: int = 2,
        heads: tuple[int, int] = (4, 2),
        tokens: tuple[int, int] = (63, 63),
        dims: tuple[int, int] = (48, 48),
        extras: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Problem:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        (num_heads, num_kv_heads), (num_queries, num_keys), (head_dim, value_dim) = heads, tokens, dims
        fitted, allowed = _pattern(pattern, batch, num_queries, num_keys, random)
        problem = Problem(
            query=2 * normal(batch, num_heads, num_queries, head_dim),
            key=normal(batch, num_kv_heads, num_keys, head_dim),
            value=normal(batch, num_kv_heads, num_keys, value_dim),
            allowed=allowed,
            options={"pattern": fitted},
        )
        if extras:
            problem.options["bias"] = normal(num_heads, num_queries, num_keys)
            problem.options["key_logits"] = normal(batch, num_keys)
        return problem.to(dtype)

    return build


@pytest.fixture(scope="session")
def plain() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return ``(output, weights, lse)`` of a problem by the textbook, every step in the dtype of its tensors."""

    def attention(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = problem.tensors
        groups = query.shape[1] // key.shape[1]
        logits = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(groups, 1))
        logits = logits * problem.options.get("scale", query.shape[-1] ** -0.5)
        if "bias" in problem.options:
            logits = logits + problem.options["bias"]
        if "key_logits" in problem.options:
            logits = logits + problem.options["key_logits"][:, None, None]
        logits = logits.masked_fill(~problem.allowed, -torch.inf)
        weights = torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)  # NaN = a row that sees nothing
        return weights @ value.repeat_interleave(groups, 1), weights, torch.logsumexp(logits, -1)

    return attention


@pytest.fixture(scope="session")
def everything() -> Callable[[int, int, int], StatisticsRequest]:
    """Return a request for every statistic of a ``(B, Nq, Nk)`` problem."""

    def request(batch: int, num_queries: int, num_keys: int) -> StatisticsRequest:
        image = torch.arange(num_keys) < num_keys // 3
        per_sample = torch.arange(num_keys)[None] % 3 == torch.arange(batch)[:, None] % 3
        return StatisticsRequest(
            lse=True,
            rows=(0, -1, num_queries // 2),
            received=True,
            mass={"image": image, "per_sample": per_sample},
            entropy=True,
            maximum=True,
            output_norm=True,
        )

    return request


@pytest.fixture(scope="session")
def measure() -> Callable[..., dict[str, Tensor]]:
    """Return every statistic of :func:`everything` from the textbook's output, weights and lse."""

    def statistics(wanted: StatisticsRequest, output: Tensor, weights: Tensor, lse: Tensor) -> dict[str, Tensor]:
        assert wanted.mass is not None
        assert wanted.rows is not None
        groups = {
            f"mass.{name}": (weights * group.expand(len(weights), -1)[:, None, None]).sum(-1)
            for name, group in wanted.mass.items()
        }
        return groups | {
            "lse": lse,
            "rows": weights[:, :, list(wanted.rows)],
            "received": weights.sum(-2),
            "entropy": -torch.xlogy(weights, weights).sum(-1),
            "maximum": weights.max(-1).values,
            "output_norm": output.square().sum(-1).sqrt(),
        }

    return statistics


@pytest.fixture(scope="session")
def flatten() -> Callable[[Any], dict[str, Tensor]]:
    """Return the tensors of a Statistics by name, mass groups as ``mass.name``; those not asked for are left out."""

    def tensors(statistics: Any) -> dict[str, Tensor]:
        fields = {name: entry for name, entry in vars(statistics).items() if isinstance(entry, Tensor)}
        return fields | {f"mass.{name}": entry for name, entry in (statistics.mass or {}).items()}

    return tensors


@pytest.fixture
def on_pretended_gpu() -> Callable[..., Any]:
    """Return a function's result for ``device="cuda"`` where tensors have sizes, dtypes and devices, but no numbers."""

    def make(function: Callable[[str], Any]) -> Any:
        with FakeTensorMode():
            return function("cuda")

    return make
