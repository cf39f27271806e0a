"""Choosing queries, groups and statistics; the values themselves are in test_conformance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vislm.errors import UsageError
from vislm.kernels import Causal, StatisticsRequest, attend, attention_statistics

pytestmark = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture
def problem(make):
    return make("padded_causal", batch=3, extras=True)


@pytest.fixture
def weights(problem, plain):
    return plain(problem)[1]


def ask(problem, backend, **wanted):
    return attention_statistics(
        problem.query, problem.key, request=StatisticsRequest(**wanted), backend=backend, **problem.options
    )


@pytest.mark.parametrize(
    "rows", [(0,), (-1,), (5, 5, -63, 62), torch.tensor([3, -2], dtype=torch.int32), [], torch.tensor([[7, -7]])]
)
def test_rows_of_chosen_queries(backend, problem, weights, rows) -> None:
    found = ask(problem, backend, rows=rows).rows
    index = torch.as_tensor(rows).long().flatten() % 63
    torch.testing.assert_close(found, weights[:, :, index], rtol=1e-5, atol=1e-6)


def test_rows_chosen_per_sample(backend, problem, weights) -> None:
    rows = torch.tensor([[0, -1], [10, 20], [62, 62]])
    found = ask(problem, backend, rows=rows).rows
    for b in range(3):
        torch.testing.assert_close(found[b], weights[b][:, rows[b]], rtol=1e-5, atol=1e-6)


def test_rows_of_a_single_query(backend, make, plain) -> None:
    problem = make("causal", tokens=(1, 63), extras=True)
    found = ask(problem, backend, rows=(0, -1)).rows
    torch.testing.assert_close(found, plain(problem)[1].expand(-1, -1, 2, -1), rtol=1e-5, atol=1e-6)


def test_received_from_everyone_some_or_where_true(backend, problem, weights) -> None:
    where = torch.arange(63) > 40
    per_sample = torch.arange(63)[None] % 3 == torch.arange(3)[:, None]
    chosen = torch.tensor([[0, 1, 1], [4, -1, 7], [8, 9, 10]])
    by_hand = torch.stack([weights[b][:, chosen[b]].sum(1) for b in range(3)])
    for received, expected in (
        (True, weights.sum(2)),
        (where, weights[:, :, where].sum(2)),
        (per_sample, torch.stack([weights[b][:, per_sample[b]].sum(1) for b in range(3)])),
        (torch.tensor([-1]), weights[:, :, -1]),
        (chosen, by_hand),
    ):
        torch.testing.assert_close(ask(problem, backend, received=received).received, expected, rtol=1e-5, atol=1e-6)


def test_mass_per_group_keeps_the_names(backend, problem, weights) -> None:
    sample_group = torch.rand(3, 63, generator=torch.Generator().manual_seed(0)) < 0.5
    groups = {"sink": torch.arange(63) == 0, "own": sample_group, "nothing": torch.zeros(1, 63, dtype=torch.bool)}
    found = ask(problem, backend, mass=groups).mass
    assert list(found) == ["sink", "own", "nothing"]
    torch.testing.assert_close(found["sink"], weights[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["own"], (weights * sample_group[:, None, None]).sum(-1), rtol=1e-5, atol=1e-6)
    assert not found["nothing"].any()
    assert ask(problem, backend, mass={}).mass == {}


def test_each_statistic_alone_is_the_same_and_the_others_are_none(backend, problem, everything, flatten) -> None:
    wanted = everything(3, 63, 63)
    options = problem.options | {"backend": backend}
    together = flatten(attend(*problem.tensors, statistics=wanted, **options).statistics)
    for field in dataclasses.fields(wanted):
        alone = StatisticsRequest(**{field.name: getattr(wanted, field.name)})
        found = flatten(attention_statistics(*problem.tensors, request=alone, **options))
        assert {name.split(".")[0] for name in found} == {field.name}
        for name, tensor in found.items():
            assert torch.equal(tensor, together[name]), name


def test_asking_for_nothing(backend, problem, flatten) -> None:
    result = attend(*problem.tensors, statistics=StatisticsRequest(), backend=backend, **problem.options)
    assert flatten(result.statistics) == {}
    assert torch.equal(result.output, attend(*problem.tensors, backend=backend, **problem.options))


def test_statistics_do_not_change_the_output(backend, problem, everything) -> None:
    options = problem.options | {"backend": backend}
    with_statistics = attend(*problem.tensors, statistics=everything(3, 63, 63), **options).output
    assert torch.equal(with_statistics, attend(*problem.tensors, **options))


def test_queries_that_see_nothing(backend, make, everything, flatten) -> None:
    problem = make("masked")
    output, statistics = attend(*problem.tensors, statistics=everything(2, 63, 63), backend=backend, **problem.options)
    assert not output[:, :, 31].any()
    assert (statistics.lse[:, :, 31] == -torch.inf).all()
    assert not statistics.rows[:, :, 2].any()  # the third row asked for is query 31
    for name, tensor in flatten(statistics).items():
        assert not tensor.isnan().any(), name
        if name in ("entropy", "maximum", "output_norm", "mass.image"):
            assert not tensor[:, :, 31].any(), name


def test_hidden_by_bias_or_key_logits_counts_as_unseen(backend, make) -> None:
    query, key, value = make().tensors
    bias = torch.zeros(63, 1)
    bias[3] = -torch.inf
    wanted = StatisticsRequest(lse=True, entropy=True)
    output, statistics = attend(query, key, value, bias=bias, statistics=wanted, backend=backend)
    assert not output[:, :, 3].any()
    assert (statistics.lse[:, :, 3] == -torch.inf).all()
    assert statistics.lse[:, :, 4:].isfinite().all()
    output = attend(query, key, value, key_logits=torch.full((63,), -torch.inf), backend=backend)
    assert not output.any()


@pytest.mark.parametrize("tokens", [(5, 0), (0, 5), (0, 0)])
def test_no_keys_or_no_queries(backend, tokens, make, flatten) -> None:
    problem = make(tokens=tokens, extras=True)
    wanted = StatisticsRequest(
        lse=True,
        received=True,
        mass={"all": torch.ones(tokens[1]).bool()},
        entropy=True,
        maximum=True,
        output_norm=True,
    )
    output, statistics = attend(*problem.tensors, statistics=wanted, backend=backend, **problem.options)
    assert output.shape == (2, 4, tokens[0], 48)
    assert not output.any()
    assert (statistics.lse == -torch.inf).all()
    for name, tensor in flatten(statistics).items():
        assert name == "lse" or not tensor.any(), name


def test_output_norm_is_taken_before_head_scale(backend, problem) -> None:
    wanted = StatisticsRequest(output_norm=True)
    plain_norm = attend(*problem.tensors, statistics=wanted, backend=backend, **problem.options)
    scaled = attend(*problem.tensors, statistics=wanted, head_scale=torch.zeros(4), backend=backend, **problem.options)
    assert not scaled.output.any()
    assert torch.equal(scaled.statistics.output_norm, plain_norm.statistics.output_norm)


def test_statistics_alone_skip_the_output(backend, make) -> None:
    """No operation touches the values unless the output's norm is wanted."""
    query, key, value = make(dims=(48, 41)).tensors

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen: set[int] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen |= set(result.shape)
            return result

    for norm in (False, True):
        with Sizes() as sizes:
            attention_statistics(
                query, key, value, request=StatisticsRequest(lse=True, output_norm=norm), backend=backend
            )
        assert (41 in sizes.seen) is norm


def test_half_precision_is_measured_in_float32(backend, make, plain) -> None:
    """A row of 4096 equal weights: their sum and entropy are far beyond the digits of half precision."""
    query, key = torch.zeros(1, 1, 2, 8, dtype=torch.float16), torch.zeros(1, 1, 4096, 8, dtype=torch.float16)
    wanted = StatisticsRequest(entropy=True, mass={"all": torch.ones(4096).bool()}, received=True)
    found = attention_statistics(query, key, request=wanted, backend=backend)
    torch.testing.assert_close(found.entropy, torch.full((1, 1, 2), 4096.0).log())
    torch.testing.assert_close(found.mass["all"], torch.ones(1, 1, 2))
    torch.testing.assert_close(found.received, torch.full((1, 1, 4096), 2 / 4096))


def test_row_of_certainty_has_no_entropy(backend) -> None:
    query = torch.full((1, 1, 1, 4), 100.0)
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, 1] = 100.0
    found = attention_statistics(query, key, request=StatisticsRequest(entropy=True, maximum=True), backend=backend)
    assert found.entropy.item() == 0
    assert found.maximum.item() == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"rows": (63,)}, r"rows holds 63, expected indices in \[-63, 63\): there are 63 queries"),
        ({"rows": torch.tensor([0, -64])}, "rows holds -64"),
        ({"rows": torch.tensor([0.5])}, "rows is torch.float32, expected integer"),
        ({"rows": torch.tensor([True])}, "rows is torch.bool, expected integer"),
        ({"rows": torch.zeros(2, 1).long()}, r"rows has shape \(2, 1\), expected \(R,\) or \(B, R\) with B = 3"),
        ({"rows": torch.tensor(0)}, r"rows has shape \(\)"),
        ({"rows": 3}, "rows=3, expected integer query indices"),
        ({"rows": ("a",)}, "expected integer query indices"),
        ({"received": torch.tensor([63])}, "received holds 63"),
        ({"received": torch.ones(62).bool()}, r"received has shape \(62,\), expected \(Nq,\) = \(63,\)"),
        ({"received": "all"}, "received is a str"),
        ({"mass": {"sink": torch.ones(63)}}, r"mass\['sink'\] is torch.float32, expected a torch.bool"),
        ({"mass": {"sink": torch.ones(5).bool()}}, r"mass\['sink'\] has shape \(5,\), expected \(Nk,\) = \(63,\)"),
        ({"output_norm": True}, "needs value="),
    ],
)
def test_what_cannot_be_measured(backend, problem, wanted, message) -> None:
    with pytest.raises(UsageError, match=message):
        ask(problem, backend, **wanted)


def test_the_request_must_be_a_request(backend, problem) -> None:
    with pytest.raises(UsageError, match="statistics is a dict, expected a StatisticsRequest"):
        attend(*problem.tensors, statistics={"lse": True}, backend=backend)


def test_rows_may_be_asked_of_a_causal_prefill(backend, make, plain) -> None:
    problem = make("causal", tokens=(17, 63))
    found = attention_statistics(
        problem.query, problem.key, request=StatisticsRequest(rows=(-1,)), pattern=Causal(), backend=backend
    )
    torch.testing.assert_close(found.rows[:, :, 0], plain(problem)[1][:, :, -1], rtol=1e-5, atol=1e-6)
