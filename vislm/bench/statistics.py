"""What a statistic of attention costs beside the attention itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from vislm.kernels import StatisticsRequest, attend


def statistics_lines(tokens: int, heads: int, head_dim: int, runs: int) -> Iterator[str]:
    """Yield a table: milliseconds (median) and the ratio to SDPA, for several statistics and for the matrix."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, head_dim, generator=generator) for _ in range(3))
    groups = {"first half": torch.arange(tokens) < tokens // 2}

    def matrix() -> torch.Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2) * head_dim**-0.5, -1)
        weights.sum(2)
        return weights @ v

    def ours(**wanted: object) -> Callable[[], object]:
        return lambda: attend(q, k, v, statistics=StatisticsRequest(**wanted))  # pyright: ignore[reportArgumentType]

    cases: dict[str, Callable[[], object]] = {
        "SDPA": lambda: scaled_dot_product_attention(q, k, v),
        "explicit matrix, column sums": matrix,
        "attend": lambda: attend(q, k, v),
        "attend + one row": ours(rows=torch.tensor([-1])),
        "attend + log-sum-exp": ours(lse=True),
        "attend + received": ours(received=True),
        "attend + mass of a group": ours(mass=groups),
        "attend + entropy": ours(entropy=True),
        "attend + output norm": ours(output_norm=True),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for _ in range(runs + 1):
            for name, case in cases.items():
                started = time.perf_counter()
                case()
                times[name].append((time.perf_counter() - started) * 1e3)
    base = statistics.median(times["SDPA"][1:])
    yield f"N={tokens}, {heads} heads x {head_dim}, float32, {torch.get_num_threads()} threads"
    yield f"{'case':<30} {'ms':>8} {'/ SDPA':>7}"
    for name, values in times.items():
        median = statistics.median(values[1:])
        yield f"{name:<30} {median:>8.2f} {median / base:>7.2f}"
