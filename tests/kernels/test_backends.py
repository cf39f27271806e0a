"""Which backend runs, and what is said when it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vislm.errors import BackendUnavailable, UnknownName, UsageError
from vislm.kernels import BACKENDS, StatisticsRequest, attend, attention_statistics, explain
from vislm.kernels.backends import reference


@pytest.fixture
def calls(monkeypatch):
    """Replace the table by three backends, of which ``picky`` refuses everything; returns what ran."""
    ran: list[str] = []

    def backend(name, reason=None):
        def run(request):
            ran.append(name)
            return reference.run(request)

        return SimpleNamespace(supports=lambda request: reason, run=run)

    table = {"picky": backend("picky", "needs a GPU"), "quick": backend("quick"), "slow": backend("slow")}
    monkeypatch.delenv("VISLM_BACKEND", raising=False)
    monkeypatch.setattr("vislm.kernels.backends.BACKENDS", table)
    return ran


def test_the_table_prefers_speed_and_ends_with_the_reference() -> None:
    assert list(BACKENDS) == ["triton", "natten", "xformers", "flex", "torch", "reference"]


def test_the_first_that_supports_the_call_runs(calls, make) -> None:
    attend(*make().tensors)
    assert calls == ["quick"]


def test_a_backend_may_wait_to_be_asked_for(calls, make, monkeypatch) -> None:
    from vislm.kernels.backends import BACKENDS as TABLE

    monkeypatch.setattr(TABLE["quick"], "only_when_forced", lambda request: "is slow here", raising=False)
    attend(*make().tensors)
    attend(*make().tensors, backend="quick")
    assert calls == ["slow", "quick"]
    assert explain(*make().tensors).reasons["quick"] == "only when forced: is slow here"


def test_an_argument_forces_and_goes_before_the_environment(calls, make, monkeypatch) -> None:
    monkeypatch.setenv("VISLM_BACKEND", "quick")
    attend(*make().tensors, backend="slow")
    assert calls == ["slow"]


def test_the_environment_forces(calls, make, monkeypatch) -> None:
    monkeypatch.setenv("VISLM_BACKEND", "slow")
    attend(*make().tensors)
    query, key, _ = make().tensors
    attention_statistics(query, key, request=StatisticsRequest(lse=True))
    assert calls == ["slow", "slow"]
    monkeypatch.setenv("VISLM_BACKEND", "")
    attend(*make().tensors)
    assert calls[-1] == "quick"


def test_a_forced_backend_that_cannot_run_says_why(calls, make, monkeypatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"'picky' \(forced by backend=\) cannot run this call: needs a GPU"):
        attend(*make().tensors, backend="picky")
    monkeypatch.setenv("VISLM_BACKEND", "picky")
    with pytest.raises(BackendUnavailable, match="forced by VISLM_BACKEND"):
        attend(*make().tensors)
    assert calls == []


def test_no_backend_lists_every_refusal(make, monkeypatch) -> None:
    table = {
        "one": SimpleNamespace(supports=lambda request: "no kernel for this"),
        "another": SimpleNamespace(supports=lambda request: "not installed"),
    }
    monkeypatch.setattr("vislm.kernels.backends.BACKENDS", table)
    with pytest.raises(BackendUnavailable, match=r"(?s)no kernel for this.*not installed"):
        attend(*make().tensors)


def test_unknown_backend_suggests_the_nearest(make, monkeypatch) -> None:
    with pytest.raises(UnknownName, match=r"unknown backend 'torhc'; did you mean 'torch'"):
        attend(*make().tensors, backend="torhc")
    monkeypatch.setenv("VISLM_BACKEND", "torhc")
    with pytest.raises(UnknownName, match="VISLM_BACKEND"):
        attend(*make().tensors)


def test_explain_lists_all_with_reasons(calls, make) -> None:
    explanation = explain(*make().tensors)
    assert explanation.chosen == "quick"
    assert explanation.reasons == {"picky": "needs a GPU", "quick": None, "slow": "could run; 'quick' comes first"}
    assert str(explanation).splitlines() == [
        "picky  needs a GPU",
        "quick  chosen",
        "slow   could run; 'quick' comes first",
    ]
    assert calls == []


def test_explain_a_forced_choice(calls, make, monkeypatch) -> None:
    forced = explain(*make().tensors, backend="slow")
    assert (forced.chosen, forced.forced_by) == ("slow", "backend=")
    assert forced.reasons["quick"] == "could run; 'slow' is forced"
    monkeypatch.setenv("VISLM_BACKEND", "picky")
    refused = explain(*make().tensors)
    assert refused.chosen is None
    assert str(refused).endswith("forced by VISLM_BACKEND")


def test_explain_checks_its_arguments_like_attend(make) -> None:
    query, key, value = make().tensors
    with pytest.raises(UsageError, match="head_scale"):
        explain(query, key, value, head_scale=query)
    with pytest.raises(UsageError, match="value has"):
        explain(query, key, value[:, :1])
