"""What the Triton backend says about itself where it cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vislm.kernels import Dense
from vislm.kernels.backends import triton as backend
from vislm.kernels.backends.triton import availability
from vislm.kernels.checks import checked_request
from vislm.kernels.request import AttentionRequest


@pytest.fixture
def request_on_cpu() -> AttentionRequest:
    query = torch.zeros(1, 2, 5, 16)
    return checked_request(
        query,
        query,
        query,
        pattern=Dense(),
        bias=None,
        scale=None,
        normalize="softmax",
        statistics=None,
        key_logits=None,
    )


def test_cpu_tensors_need_the_interpreter(request_on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "installed", lambda: True)
    assert backend.supports(request_on_cpu) == "needs CUDA tensors, these are on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.supports(request_on_cpu) is None


def test_without_triton(request_on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "installed", lambda: False)
    assert backend.supports(request_on_cpu) == "Triton is not installed"


def test_old_cards_are_refused(request_on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    shape = request_on_cpu.shape._replace(device=torch.device("cuda"))
    monkeypatch.setattr(AttentionRequest, "shape", shape)
    assert backend.supports(request_on_cpu) == "needs compute capability 8.0, this card has 7.5"


def test_asking_does_not_import_triton() -> None:
    code = (
        "import sys, torch\nfrom vislm.kernels import attend, explain\nfrom vislm.kernels.backends import triton\n"
        "before = 'triton' in sys.modules\nq = torch.zeros(1, 1, 3, 16)\nattend(q, q, q)\nexplain(q, q, q)\n"
        "print(before, 'triton' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
