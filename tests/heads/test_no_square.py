"""No head method, no calibration and no recorder ever holds a matrix of all rows by all keys, in any precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch
from running import generate, one_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vislm import attach, registry
from vislm.analysis import rows
from vislm.analysis.recorder import Recorder
from vislm.calibration.row_heads import RowHeads, Silenced, calibrated, zero_tuned
from vislm.heads.act import ACT
from vislm.heads.ad_hh import ADHH
from vislm.heads.air import AIR
from vislm.heads.carve import Recorder as CarveRecorder
from vislm.heads.dola import DoLa
from vislm.heads.ilvad import ILVAD
from vislm.heads.imbalanced import Imbalanced
from vislm.heads.opera import OPERA
from vislm.heads.pai import PAI
from vislm.heads.spin import SPIN
from vislm.heads.vaf import VAF
from vislm.heads.var import VAR
from vislm.heads.vcd import VCD
from vislm.heads.vhr import VHR
from vislm.heads.zerotuning import ZeroTuning
from vislm.kernels import sweep
from vislm.kernels.scratch import release_scratch
from vislm.lmm.decoder import edits

HEADS = ((0, 0), (1, 3), (2, 0), (2, 1))
CASES: dict[str, list[Any]] = {
    "act": [ACT(heads=HEADS, beta=0.2, threshold=0.01)],
    "ad_hh": [ADHH(heads=HEADS, threshold=0.05)],
    "air": [
        AIR(heads=HEADS, threshold=0.05),
        AIR(heads=HEADS, threshold=0.05, project_prefill=True, rescale_logits=True),
    ],
    "carve": [CarveRecorder(layers=(1, 2))],
    "dola": [DoLa()],
    "ilvad": [ILVAD(draft_tokens=4, activation=1.5)],
    "imbalanced": [Imbalanced()],
    "opera": [OPERA(num_beams=2, candidates=2, threshold=1)],
    "pai": [PAI(alpha=0.5)],
    "spin": [SPIN(keep_ratio=0.5)],
    "vaf": [VAF(enh_para=1.5, sup_para=0.7)],
    "var": [VAR(dims=(3, 7, 20), tau=1.6, summ=0.0, rho=1.0)],
    "vcd": [VCD()],
    "vhr": [VHR(), VHR(text_stream="image_only")],
    "zerotuning": [ZeroTuning(factors=((0, 1, 3.0), (2, 0, 0.3), (2, 3, 2.0)))],
}
"""What CARVE attaches is its recorder; it observes, as the analysis does."""
WORDS = 451
SETTINGS = [pytest.param(method, id=f"{name}-{n}") for name, cases in CASES.items() for n, method in enumerate(cases)]


class Probe(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives, in entries that are really there, with its operation.

    A view counts as what it looks at, so that a mask that is merely expanded is no matrix; part of a fused kernel's
    work is not seen, which is why it is fused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.where = 0, "nothing"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                entries = tensor.untyped_storage().nbytes() // tensor.element_size()
                if entries > self.entries:
                    self.entries, self.where = entries, f"{func} gives {tuple(tensor.shape)} {tensor.dtype}"
        return out


def prompt(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return one_image("llava", words=tuple(7 + i % 40 for i in range(WORDS)), dtype=dtype)


def limit() -> int:
    """Half a matrix of one head."""
    return prompt()["input_ids"].shape[1] ** 2 // 2


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Pieces are as large as a processor's cache, which holds the matrices of a prompt as short as this one."""
    monkeypatch.setattr(edits, "PIECE", 2**14)
    monkeypatch.setattr(rows, "PIECE", 2**14)
    monkeypatch.setattr(sweep, "CPU_PAIRS", 2**13)
    release_scratch()


@contextmanager
def no_square() -> Iterator[None]:
    with Probe() as probe:
        yield
    assert probe.entries < limit(), probe.where


def test_every_head_method_has_a_case() -> None:
    assert sorted(CASES) == registry.names("heads")
    for name, cases in CASES.items():
        assert name == "carve" or all(isinstance(case, registry.method("heads", name)) for case in cases)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_prefill_and_decode_hold_no_square(method: Any, dtype: torch.dtype) -> None:
    model, inputs = models.llava(dtype=dtype), prompt(dtype)
    with no_square():
        generate(model, inputs, method, max_new_tokens=4)


EXPLICIT = [
    param for param in SETTINGS if not isinstance(param.values[0], (CarveRecorder, DoLa, ILVAD, OPERA, VCD, VHR))
]


@pytest.mark.parametrize("method", EXPLICIT)
def test_pieces_give_what_all_rows_at_once_give(method: Any, monkeypatch) -> None:
    """The methods act here at all, and the size of the pieces does not matter."""
    model, inputs = models.llava(), prompt()
    untouched, _, _ = generate(model, inputs, max_new_tokens=2)
    monkeypatch.setattr(edits, "PIECE", 2**30)
    with Probe() as probe:
        whole, _, _ = generate(model, inputs, method, max_new_tokens=2)
    monkeypatch.setattr(edits, "PIECE", 2**12)
    piecewise, _, _ = generate(model, inputs, method, max_new_tokens=2)
    assert (whole - untouched).abs().max() > 1e-3
    torch.testing.assert_close(piecewise, whole, atol=2e-5, rtol=1e-5)
    if isinstance(method, (ACT, ZeroTuning)) or getattr(method, "project_prefill", False):
        assert probe.entries > limit(), "without pieces these hold all rows, which the probe has to see"


def test_untouched_generation_holds_no_square() -> None:
    with no_square():
        generate(models.llava(), prompt(), max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_probe_catches_eager_attention(dtype: torch.dtype) -> None:
    model = models.llava(dtype=dtype)
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(AssertionError, match="gives"), no_square():
        model.generate(**prompt(dtype), max_new_tokens=1)


N = 3 + models.PATCHES + WORDS
SQUARES: dict[str, Callable[[], Any]] = {
    "bool": lambda: torch.ones(N, N, dtype=torch.bool),
    "int8": lambda: torch.empty(N, N, dtype=torch.int8),
    "half": lambda: torch.zeros(1, 4, N, N, dtype=torch.float16),
    "one of several outputs": lambda: torch.zeros(1, N).expand(N, N).sort(),
    "a product that is reduced at once": lambda: (torch.ones(N, 8) @ torch.ones(8, N)).sum(),
    "a flat one": lambda: torch.zeros(N).repeat(N),
    "an index": lambda: torch.ones(N, 1).nonzero().expand(-1, 2).repeat(N // 2, 1),
}


@pytest.mark.parametrize("name", SQUARES)
def test_the_probe_catches_squares_of_every_kind(name: str) -> None:
    with pytest.raises(AssertionError, match="gives"), no_square():
        SQUARES[name]()


def test_the_probe_lets_views_pass() -> None:
    with no_square():
        assert torch.zeros(1, N).expand(N, N).shape == torch.ones(N, 8).mT.expand(N, 8, N).shape[::2]


@pytest.mark.parametrize(
    "recorder",
    [
        Recorder(),
        Recorder(level="last_rows", divergence=True, sink_dims=(3, 7), tau=1.6, keep_calls=True),
        Recorder(columns=True),
    ],
    ids=["reductions", "last rows", "columns"],
)
def test_the_recorder_of_the_analysis_holds_no_square(recorder: Recorder) -> None:
    model = models.llava()
    with no_square(), attach(model, recorder):
        model.generate(**prompt(), max_new_tokens=3, do_sample=False)


ROWS = RowHeads(((0, 1), (2, 3)))


@pytest.mark.parametrize(
    "tried",
    [calibrated(ROWS, 0.2, 0.01, "first_found"), zero_tuned(ROWS, 2.0), Silenced(ROWS)],
    ids=["act", "zerotuning", "ad_hh"],
)
def test_calibration_holds_no_square(tried: Any) -> None:
    """Heads are tried on copies of a prompt in one batch."""
    model, inputs = models.llava(), {name: torch.cat([value] * 2) for name, value in prompt().items()}
    with no_square(), attach(model, tried), torch.no_grad():
        model(**inputs)
