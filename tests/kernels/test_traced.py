"""Under a tracer a call is one node; its numbers, statistics, gradients and errors are those of the call itself."""

from __future__ import annotations

import pytest
import torch

from vislm.errors import UsageError
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
    attend,
    attention_statistics,
)
from vislm.kernels.patterns import PATTERNS
from vislm.kernels.written import WRITTEN, Options, read, write


@pytest.fixture(autouse=True)
def fresh():
    """Forget what was compiled: PyTorch gives up on a function after a few versions of it."""
    torch.compiler.reset()


GRID, HEADS, DIM = (4, 5), 2, 3


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def heads(tokens: int = 20) -> list[torch.Tensor]:
    return tensors(0, *[(2, HEADS, tokens, DIM)] * 3)


TABLE, ROWS, COLUMNS, DENSE, ONE, LEFT, RIGHT, LOGITS = LEARNED = tensors(
    1, (HEADS, 5, 5), (13, DIM), (13, DIM), (1, HEADS, 20, 20), (1, 1, 20, 20), *[(1, 1, 20, 2)] * 2, (2, 20)
)
CASES = {
    "neighborhood": {"pattern": Neighborhood(GRID, 3), "bias": RelativeBias(TABLE)},
    "dilated": {"pattern": Neighborhood(GRID, 2, dilation=2, border="mask")},
    "window": {"pattern": Window(GRID, (2, 5), (1, 0)), "scale": 0.7},
    "zero border": {"pattern": Blocked((4, 5), (2, 5), 1, border="zero"), "bias": DecoupledBias((ROWS, COLUMNS))},
    "dense bias": {"pattern": Dense(), "bias": DENSE},
    "low rank": {"pattern": Causal(), "bias": LowRankBias(LEFT, RIGHT)},
    "headwise": {"bias": HeadwiseBias(LowRankBias(LEFT, RIGHT), (1,), ONE, (0,))},
    "key logits": {"key_logits": LOGITS},
    "sigmoid": {"normalize": Sigmoid(-2.0, 0.1, "length"), "pattern": Causal()},
    "masked": {"pattern": Masked(torch.ones(20, 20, dtype=torch.bool).tril(3))},
    "padded": {"pattern": Padded(torch.arange(20).expand(2, -1) < 17)},
    "head scale": {"pattern": Window(GRID, 2), "head_scale": torch.tensor([0.5, 2.0])},
}


def traced(function):
    """Compile a function without code generation, and say how often the node was in the graph."""
    found: list[int] = []

    def backend(graph, _inputs):
        found.append(sum(str(node.target).startswith("vislm.attend") for node in graph.graph.nodes))
        return graph.forward

    return torch.compile(function, backend=backend, fullgraph=True), found


@pytest.mark.parametrize("case", CASES)
def test_one_node_with_the_numbers_of_the_call(case) -> None:
    function, found = traced(lambda *given: attend(*given, **CASES[case]))
    given = heads()
    torch.testing.assert_close(function(*given), attend(*given, **CASES[case]))
    assert found == [1]


@pytest.mark.parametrize("case", CASES)
def test_gradients(case) -> None:
    given = heads()

    def gradients(function):
        loss = function(*given, **CASES[case]).sin().sum()
        return torch.autograd.grad(loss, [*given, *LEARNED], allow_unused=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(gradients(compiled), gradients(attend), strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected)


EVERYTHING = StatisticsRequest(
    lse=True,
    rows=(0, -1),
    received=torch.arange(20) > 4,
    mass={"left": torch.arange(20) < 10, "first": torch.arange(20) < 1},
    entropy=True,
    maximum=True,
    output_norm=True,
)


@pytest.mark.parametrize("pattern", [Dense(), Neighborhood(GRID, 3), Blocked((4, 4), 2, 1, border="zero")])
def test_statistics(pattern) -> None:
    tokens = 16 if isinstance(pattern, Blocked) else 20
    wanted = EVERYTHING
    if tokens == 16:
        wanted = StatisticsRequest(lse=True, rows=torch.tensor([[0], [2]]), received=True)
    given = heads(tokens)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    ours = compiled(*given, pattern=pattern, statistics=wanted)
    expected = attend(*given, pattern=pattern, statistics=wanted)
    torch.testing.assert_close(ours.output, expected.output)
    assert vars(ours.statistics).keys() == vars(expected.statistics).keys()
    for name, entry in vars(expected.statistics).items():
        torch.testing.assert_close(getattr(ours.statistics, name), entry) if name != "weights" else None
    assert ours.statistics.weights == expected.statistics.weights
    slopes = [torch.autograd.grad(answer.statistics.lse.sum(), given[:2])[0] for answer in (ours, expected)]
    torch.testing.assert_close(*slopes)


def test_statistics_alone() -> None:
    query, key, value = heads()
    compiled = torch.compile(attention_statistics, backend="aot_eager", fullgraph=True)
    for request, third in ((StatisticsRequest(received=True), None), (EVERYTHING, value)):
        ours, expected = (
            function(query, key, third, request=request, pattern=Window(GRID, 2))
            for function in (compiled, attention_statistics)
        )
        torch.testing.assert_close(ours.received, expected.received)
        torch.testing.assert_close(ours.output_norm, expected.output_norm)


def test_plain_attention_stays_what_every_compiler_knows() -> None:
    function, found = traced(attend)
    function(*heads())
    assert found == [0]


def test_half_precision_and_autocast() -> None:
    given = [tensor.detach() for tensor in heads()]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (function(*given, pattern=Window(GRID, 2)) for function in (compiled, attend))
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_exported_with_any_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value, pattern=Neighborhood(GRID, 3))

    given = [tensor.detach() for tensor in heads()]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), tuple(given), dynamic_shapes=({0: batch},) * 3)
    more = [torch.cat((tensor, tensor, tensor)) for tensor in given]
    torch.testing.assert_close(program.module()(*more), Model()(*more))


def test_another_grid_is_traced_anew() -> None:
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for grid in ((4, 5), (5, 4), (2, 3), (6, 6)):
        given = heads(grid[0] * grid[1])
        expected = attend(*given, pattern=Neighborhood(grid, 2))
        torch.testing.assert_close(compiled(*given, pattern=Neighborhood(grid, 2)), expected)


def test_errors_are_the_same() -> None:
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.raises(UsageError, match="expects 6 keys"):
        compiled(*heads(), pattern=Neighborhood((2, 3), 2))


def test_every_pattern_can_be_written() -> None:
    assert {pattern.__name__ for pattern in PATTERNS} <= set(WRITTEN)
    for case in CASES.values():
        options = {"pattern": Dense(), "bias": None, "key_logits": None, "scale": None, "normalize": "softmax"}
        options |= {name: entry for name, entry in case.items() if name != "head_scale"}
        given = Options(**options, statistics=EVERYTHING, backend=None)
        again = read(*write(given))
        assert write(again)[1] == write(given)[1]
        assert all(a is b for a, b in zip(write(again)[0], write(given)[0], strict=True))
