"""Seeded attention problems, and the table of combinations that the conformance suite runs.

Each pattern is made twice: as the package's object, and as a :class:`Layout` written by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cache, lru_cache
from itertools import combinations, product
from typing import Any

import torch
from attention_textbook import (
    Layout,
    Result,
    blocked_axis,
    grid_layout,
    neighborhood_axis,
    spread,
    textbook,
    window_axis,
)
from torch import Tensor

from vislm.kernels import (
    Blocked,
    Causal,
    DecoupledBias,
    Dense,
    HeadwiseBias,
    LowRankBias,
    Masked,
    Neighborhood,
    Padded,
    RelativeBias,
    Sigmoid,
    StatisticsRequest,
    Window,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BIASES = ("none", "dense", "relative", "decoupled", "low_rank", "headwise")
SIGMOIDS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "sigmoid": {},
    "sharp": {"bias": -2.0, "temperature": 0.5},
    "by_length": {"row_norm": "length"},
    "by_root": {"row_norm": "sqrt_length", "bias": 0.0},
}
HEADS = 4
SEQUENCES = {"self": (63, 63), "cross": (17, 63), "more_queries": (63, 17), "decode": (1, 63)}
SEQUENCE_PATTERNS = ("dense", "causal", "padded", "padded_causal", "masked")
# name: (pattern class, grid, options); scalars in the options repeat over the axes
GRIDS: dict[str, tuple[type, tuple[int, ...], dict[str, Any]]] = {
    "na1d": (Neighborhood, (23,), {"window": 5}),
    "na1d_causal": (Neighborhood, (23,), {"window": 4, "stride": 3, "causal": True}),
    "na1d_whole": (Neighborhood, (7,), {"window": 7}),
    "na2d": (Neighborhood, (5, 9), {"window": (3, 4)}),
    "na2d_dilated": (Neighborhood, (7, 9), {"window": 3, "dilation": 2}),
    "na2d_stride": (Neighborhood, (5, 9), {"window": (4, 3), "stride": (2, 3)}),
    "na2d_masked": (Neighborhood, (5, 9), {"window": (3, 4), "stride": (1, 2), "border": "mask"}),
    "na2d_whole_axis": (Neighborhood, (5, 9), {"window": (5, 1)}),
    "na2d_causal": (Neighborhood, (5, 9), {"window": 3, "dilation": (1, 2), "causal": (False, True)}),
    "na3d": (Neighborhood, (3, 4, 5), {"window": (2, 3, 3), "stride": (1, 2, 3)}),
    "na3d_mixed": (Neighborhood, (3, 4, 5), {"window": 2, "dilation": (1, 2, 2), "causal": (True, False, False)}),
    "halo": (Blocked, (5, 9), {"block": (2, 4), "halo": 1}),
    "halo_zero": (Blocked, (4, 6), {"block": 2, "halo": (1, 2), "border": "zero"}),
    "halo_strided": (Blocked, (4, 8), {"block": (2, 4), "halo": 1, "query_stride": 2}),
    "halo_zero_strided": (Blocked, (4, 8), {"block": 4, "halo": 1, "query_stride": (2, 1), "border": "zero"}),
    "halo1d": (Blocked, (23,), {"block": 5, "halo": 2}),
    "halo3d": (Blocked, (3, 4, 5), {"block": (2, 2, 3), "halo": (0, 1, 1)}),
    "swin": (Window, (5, 9), {"window": (3, 4)}),
    "swin_shifted": (Window, (5, 9), {"window": (3, 4), "shift": (1, 2)}),
    "swin_whole": (Window, (5, 9), {"window": (5, 9)}),
    "swin3d": (Window, (3, 4, 5), {"window": (2, 2, 3), "shift": (1, 0, 2)}),
}
PREFIXES = {"": (0, 0), "+prefix": (2, 2), "+prefix_keys": (0, 2)}
DEFAULTS: dict[type, dict[str, Any]] = {
    Neighborhood: {"stride": 1, "dilation": 1, "causal": False, "border": "shift"},
    Blocked: {"halo": 0, "query_stride": 1, "border": "mask"},
    Window: {"shift": 0},
}
Pair = tuple[tuple[str, Any], tuple[str, Any]]
RULES: dict[type, Callable[..., Any]] = {Neighborhood: neighborhood_axis, Blocked: blocked_axis, Window: window_axis}


@dataclass(frozen=True)
class Case:
    """One row of the table; ``where`` names the pattern and its shape."""

    where: str
    bias: str
    dtype: str
    batch: int
    normalize: str = "softmax"

    def __str__(self) -> str:
        return "-".join((self.where, self.bias, self.dtype, f"b{self.batch}", self.normalize))


@dataclass
class Problem:
    """The inputs of one call of ``attend`` and what the textbook needs to know about them.

    ``factors`` holds the tensors of the bias by name, from which the package's bias and the textbook's logits are made.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Any
    layout: Layout
    bias: str = "none"
    factors: dict[str, Tensor] = field(default_factory=dict)
    sigmoid: Mapping[str, Any] | None = None

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all tensors that get gradients, as fresh leaves in ``dtype``."""
        tensors = {"query": self.query, "key": self.key, "value": self.value, **self.factors}
        return {name: tensor.to(dtype).detach().requires_grad_() for name, tensor in tensors.items()}

    def sample(self, index: int) -> Any:
        """Return the pattern of one sample."""
        if isinstance(self.pattern, Padded):
            return Padded(self.pattern.valid[index : index + 1], causal=self.pattern.causal)
        return Masked(self.pattern.allowed[index : index + 1]) if isinstance(self.pattern, Masked) else self.pattern

    def options(self, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of ``attend``."""
        normalize = "softmax" if self.sigmoid is None else Sigmoid(**self.sigmoid)
        options = {"pattern": self._pattern(leaves["query"].device), "bias": self._bias(leaves), "normalize": normalize}
        return options | ({"key_logits": leaves["key_logits"]} if "key_logits" in leaves else {})

    def _pattern(self, device: torch.device) -> Any:
        if isinstance(self.pattern, Padded):
            return Padded(self.pattern.valid.to(device), causal=self.pattern.causal)
        return Masked(self.pattern.allowed.to(device)) if isinstance(self.pattern, Masked) else self.pattern

    def _bias(self, leaves: Mapping[str, Tensor]) -> Any:
        if self.bias == "dense":
            return leaves["dense"]
        if self.bias == "relative":
            return RelativeBias(leaves["table"])
        if self.bias == "decoupled":
            return DecoupledBias(tuple(leaves[f"table{axis}"] for axis in range(len(self.layout.offsets))), scaled=True)
        if self.bias == "low_rank":
            return LowRankBias(leaves["query_factor"], leaves["key_factor"])
        if self.bias == "headwise":
            return HeadwiseBias(
                LowRankBias(leaves["query_factor"], leaves["key_factor"]), (3, 0), leaves["dense"], (1, 2)
            )
        return None

    def textbook(self, leaves: Mapping[str, Tensor]) -> Result:
        """Return the attention of ``leaves`` by the textbook, in their dtype."""
        inputs = (leaves["query"], leaves["key"], leaves["value"])
        return textbook(*inputs, self.layout, self._additive(leaves), sigmoid=self.sigmoid)

    def _additive(self, leaves: Mapping[str, Tensor]) -> Tensor | None:
        if self.bias == "none":
            return None
        if self.bias in ("relative", "decoupled"):
            return self._by_position(leaves)
        product_ = leaves["query_factor"] @ leaves["key_factor"].transpose(-1, -2) if self.bias != "dense" else None
        if self.bias == "low_rank":
            return spread(product_, self.layout, -1)
        if self.bias == "headwise":
            heads = [product_[:, 1], leaves["dense"][:, 0], leaves["dense"][:, 1], product_[:, 0]]
            batch = leaves["query"].shape[0]
            joined = torch.stack([head.expand(batch, -1, -1) for head in heads], dim=1)
            return spread(joined, self.layout, -1)
        return spread(leaves["dense"], self.layout, -1) + spread(leaves["key_logits"], self.layout, -1)[:, None, None]

    def _by_position(self, leaves: Mapping[str, Tensor]) -> Tensor:
        patches = self.layout.patches
        assert patches is not None
        if self.bias == "relative":
            table = leaves["table"]
            middle = [(size - 1) // 2 for size in table.shape[1:]]
            index = [(offset + at) * patches for offset, at in zip(self.layout.offsets, middle, strict=True)]
            return (table[(slice(None), *index)] * patches)[None]
        query, total = leaves["query"], torch.zeros((), dtype=leaves["query"].dtype)
        rows = torch.arange(query.shape[2])[:, None]
        for axis, offset in enumerate(self.layout.offsets):
            table = leaves[f"table{axis}"]
            logits = query @ table.transpose(-1, -2) * query.shape[-1] ** -0.5
            total = total + logits[:, :, rows, (offset + (table.shape[-2] - 1) // 2) * patches]
        return total * patches


@lru_cache(maxsize=4)
def problem_of(case: Case) -> Problem:
    """Return the seeded problem of a row of the table."""
    random = torch.Generator().manual_seed(sum(map(ord, str(case))))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(DTYPES[case.dtype])

    pattern, layout = pattern_of(case.where, case.batch, random)
    num_queries, num_real = layout.allowed.shape[-2], layout.allowed.shape[-1]
    if layout.real is not None:
        num_real = int(layout.real.sum())
    number = WHERES.index(case.where)
    head_dim, value_dim = ((48, 48), (32, 32), (48, 24))[number % 3]
    key_heads = (2, 4, 1)[number % 3]
    problem = Problem(
        query=2 * normal(case.batch, HEADS, num_queries, head_dim),
        key=normal(case.batch, key_heads, num_real, head_dim),
        value=normal(case.batch, key_heads, num_real, value_dim),
        pattern=pattern,
        layout=layout,
        bias=case.bias,
        sigmoid=SIGMOIDS[case.normalize],
    )
    problem.factors = _factors(problem, case, normal)
    return problem


def _factors(problem: Problem, case: Case, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    num_queries, num_keys, head_dim = problem.query.shape[2], problem.key.shape[2], problem.query.shape[3]
    sizes = [2 * int(offset.abs().max()) + 1 for offset in problem.layout.offsets]
    if case.bias == "dense":
        dense = normal(HEADS, num_queries, num_keys)
        dense[:, :, ::11] = -torch.inf
        return {"dense": dense, "key_logits": normal(case.batch, num_keys)}
    if case.bias == "relative":
        return {"table": normal(HEADS, *sizes)}
    if case.bias == "decoupled":
        return {f"table{axis}": normal(*((HEADS,) if axis else ()), size, head_dim) for axis, size in enumerate(sizes)}
    if case.bias == "low_rank":
        return {"query_factor": normal(case.batch, 1, num_queries, 3), "key_factor": normal(1, HEADS, num_keys, 3)}
    if case.bias == "headwise":
        factors = {"query_factor": normal(1, 2, num_queries, 3), "key_factor": normal(1, 2, num_keys, 3)}
        return factors | {"dense": normal(case.batch, 2, num_queries, num_keys)}
    return {}


def pattern_of(where: str, batch: int, random: torch.Generator) -> tuple[Any, Layout]:
    """Return the package's pattern and the same by hand."""
    name, _, shape = where.partition("/")
    if shape:
        return _sequence(name, batch, *SEQUENCES[shape], random)
    name, plus, prefix = where.partition("+")
    return _on_grid(name, PREFIXES[plus + prefix])


def _sequence(name: str, batch: int, num_queries: int, num_keys: int, random: torch.Generator) -> tuple[Any, Layout]:
    triangle = [[j <= i + num_keys - num_queries for j in range(num_keys)] for i in range(num_queries)]
    past = torch.tensor(triangle, dtype=torch.bool)
    everything = torch.ones(batch, 1, num_queries, num_keys, dtype=torch.bool)
    valid = torch.rand(batch, num_keys, generator=random) < 0.7
    valid[0, : num_keys // 2] = False  # left padding: with a causal mask the first queries see nothing
    scattered = torch.rand(batch, 1, num_queries, num_keys, generator=random) < 0.4
    scattered[:, :, num_queries // 2] = False
    pattern, allowed = {
        "dense": (Dense(), everything),
        "causal": (Causal(), everything & past),
        "padded": (Padded(valid), everything & valid[:, None, None]),
        "padded_causal": (Padded(valid, causal=True), everything & valid[:, None, None] & past),
        "masked": (Masked(scattered), scattered),
    }[name]
    return pattern, Layout(allowed)


@cache
def _on_grid(name: str, prefix: tuple[int, int]) -> tuple[Any, Layout]:
    kind, grid, given = GRIDS[name]
    pattern = kind(grid, **given, prefix=prefix[1])
    options = DEFAULTS[kind] | given
    along = [
        {option: entry[axis] if isinstance(entry, tuple) else entry for option, entry in options.items()}
        for axis in range(len(grid))
    ]
    query_grid = tuple(size // mine.get("query_stride", 1) for size, mine in zip(grid, along, strict=True))
    zero = options.get("border") == "zero"
    margin = tuple(mine["halo"] if zero else 0 for mine in along)

    def rule(axis: int, position: int) -> Any:
        return RULES[kind](grid[axis], position, **along[axis])

    return pattern, grid_layout(grid, query_grid, margin, prefix, rule)


def statistics_of(case: Case, num_queries: int, num_keys: int) -> StatisticsRequest:
    """Return a request for every statistic; what is summed over the queries takes turns."""
    random = torch.Generator().manual_seed(len(str(case)))
    some = torch.randint(num_queries, (case.batch, 3), generator=random)
    where = torch.rand(case.batch, num_queries, generator=random) < 0.5
    received = (True, some, where)[sum(map(ord, str(case))) % 3]
    image = torch.arange(num_keys) < num_keys // 3
    per_sample = torch.arange(num_keys)[None] % 3 == torch.arange(case.batch)[:, None] % 3
    return StatisticsRequest(
        lse=case.normalize == "softmax",
        rows=(0, -1, num_queries // 2),
        received=received,
        mass={"image": image, "per_sample": per_sample},
        entropy=True,
        maximum=True,
        output_norm=True,
    )


ROW_NORMED = ("by_length", "by_root")

WHERES = [f"{name}/{shape}" for name in SEQUENCE_PATTERNS for shape in SEQUENCES] + [
    name + prefix for prefix in PREFIXES for name in GRIDS
]


def biases_at(where: str) -> list[str]:
    """Return the biases that exist for a pattern: those by relative position need a grid without causal axes."""
    name = where.partition("+")[0]
    relative = name in GRIDS and "causal" not in name and "mixed" not in name
    return [bias for bias in BIASES if relative or bias not in ("relative", "decoupled")]


def table() -> list[Case]:
    """Return the rows: every pattern with every bias, and for sigmoid every pattern with two biases.

    Dtype, batch size and normalisation of a row are those that make most pairs of values that no earlier row has; among
    equal ones those used least. So with softmax every pair of values of any two properties occurs.
    """
    rows: list[Case] = []
    for normalizations in (["softmax"], list(SIGMOIDS)[1:]):
        met: set[Pair] = set()
        used: Counter[Any] = Counter()
        for number, where in enumerate(WHERES):
            biases = biases_at(where)
            if len(normalizations) > 1:
                biases = [biases[(number + step) % len(biases)] for step in (0, 2)]
            for bias in biases:
                legal = [name for name in normalizations if name not in ROW_NORMED or not _lacks_rows(where)]
                choices = [Case(where, bias, *rest) for rest in product(DTYPES, (1, 3), legal)]
                row = max(choices, key=lambda case: (_new(case, met), -sum(used[value] for value in astuple(case))))
                rows.append(row)
                met |= pairs(row)
                used.update(astuple(row))
    return rows


def _lacks_rows(where: str) -> bool:
    """Return whether a pattern's queries have no position among the keys that a row norm could count."""
    return where.startswith(("halo_zero", "halo_strided"))


def _new(case: Case, met: set[Pair]) -> tuple[int, int]:
    """Return how many pairs no row has had: those without the pattern, of which few rows are to have all, and all."""
    new = pairs(case) - met
    return len([pair for pair in new if pair[0][0] != "where"]), len(new)


def pairs(case: Case) -> set[Pair]:
    """Return the pairs of (property, value) that a row has."""
    return set(combinations(asdict(case).items(), 2))


CASES = table()
