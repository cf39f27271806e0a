"""What statistics of attention cost at the size of a multimodal prompt, beside SDPA and the explicit matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vislm.bench.kernels.cases import Case, Setting, inputs_of
from vislm.kernels import StatisticsRequest, attend

STATISTICS = "statistics"
SDPA, EAGER = "SDPA", "eager, column sums"
ROW, ROWS, RECEIVED = "rows of 1 query", "rows of 64 queries", "attention received"
_NO_BACKWARD = "statistics are taken in inference"


def statistics_setting(setting: Setting, tokens: int = 2880) -> Setting:
    """Return the problem of 14 heads x 64 over ``tokens`` tokens, on the device of another setting."""
    return Setting(
        STATISTICS, (tokens,), heads=14, head_dim=64, memory_limit=setting.memory_limit, threads=setting.threads,
        device=setting.device, dtype=setting.dtype, peers=setting.peers,
    )  # fmt: skip


def statistics_cases(setting: Setting) -> Iterator[Case]:
    """Yield SDPA, the eager path that sums the columns of its matrix, and our ways to the same figures."""
    inputs = inputs_of(setting)
    wanted = {
        ROW: StatisticsRequest(rows=torch.tensor([-1])),
        ROWS: StatisticsRequest(rows=torch.linspace(0, setting.tokens - 1, 64).long()),
        RECEIVED: StatisticsRequest(received=True),
    }

    def ours(statistics: StatisticsRequest, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, statistics=statistics).output

    yield Case(SDPA, inputs, scaled_dot_product_attention, no_backward=_NO_BACKWARD)
    for name, statistics in wanted.items():
        yield Case(name, inputs, partial(ours, statistics), SDPA, no_backward=_NO_BACKWARD)
    yield Case(EAGER, inputs, partial(_eager, setting.head_dim**-0.5), SDPA, no_backward=_NO_BACKWARD)


def _eager(scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    weights.sum(2)
    return weights @ v
