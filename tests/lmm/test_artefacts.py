"""Files of head lists, factors and dimensions: what is written is read back, and by the right model only."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import UsageError
from vislm.lmm.adapters import adapter_for
from vislm.lmm.artefacts import fingerprint, head_factors, head_list, sink_dims, write_artefact

MODEL = models.llava()
ADAPTER = adapter_for(MODEL)


def test_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "found" / "a.json"
    write_artefact(path, "heads", "ad_hh", MODEL, [(3, 2), (0, 1), (3, 0)], samples=40)
    assert head_list(str(path), ADAPTER, ("air", "ad_hh")) == {0: (1,), 3: (0, 2)}
    assert json.loads(path.read_text())["samples"] == 40
    write_artefact(path, "factors", "zerotuning", MODEL, [(3, 2, 0.5), (0, 1, 2)])
    assert head_factors(str(path), ADAPTER, ("zerotuning",)) == {0: {1: 2.0}, 3: {2: 0.5}}
    write_artefact(path, "sink_dims", "var", MODEL, [7, 3])
    assert sink_dims(str(path), ADAPTER, ("var",)) == (3, 7)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=6))
def test_text_and_tuples_say_the_same(pairs: list[tuple[int, int]]) -> None:
    text = "+".join(f"{layer}/{head}" for layer, head in pairs)
    heads = head_list(text, ADAPTER, ("ad_hh",))
    assert heads == head_list(tuple(pairs), ADAPTER, ("ad_hh",))
    assert {(layer, head) for layer, listed in heads.items() for head in listed} == set(pairs)


def test_dimensions_are_plain_numbers() -> None:
    assert sink_dims((5, 1, 5), ADAPTER, ("var",)) == sink_dims("5+1", ADAPTER, ("var",)) == (1, 5)


def test_the_fingerprint_knows_weights_and_not_their_precision() -> None:
    mine = fingerprint(MODEL)
    assert mine == fingerprint(models.llava(dtype=torch.bfloat16)) == fingerprint(models.llava(dtype=torch.float16))
    assert mine != fingerprint(models.llava(seed=1))
    assert mine != fingerprint(models.llava(layers=4))
    tuned = models.llava()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    assert mine != fingerprint(tuned)


def test_the_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def refused(content: str, message: str) -> None:
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            head_list(str(path), ADAPTER, ("ad_hh",))

    good = {"kind": "heads", "method": "ad_hh", "model": fingerprint(MODEL), "heads": [[0, 1]]}
    refused("{", "cannot read the artefact")
    refused("[]", "is not an artefact")
    refused(json.dumps({**good, "heads": 3}), "is not an artefact")
    refused(json.dumps({**good, "kind": "factors", "factors": []}), "of kind 'factors'; ad_hh needs 'heads'")
    refused(json.dumps({**good, "method": "vhr"}), "made for 'vhr', not for ad_hh")
    refused(json.dumps({**good, "model": "0" * 16}), "fingerprint '0000000000000000'; this one has")
    refused(json.dumps({**good, "heads": [[0]]}), r"entry \[0\]; expected entries such as 16/29\+26/9")
    refused(json.dumps({**good, "heads": [["a", 1]]}), "expected entries such as")
    refused(json.dumps({**good, "heads": [[0.5, 1]]}), "expected entries such as")
    refused(json.dumps({**good, "heads": [[0, 4]]}), "lies outside the model, which has 5 layers of 4 heads")
    with pytest.raises(UsageError, match="cannot read the artefact"):
        head_list(str(tmp_path / "none.json"), ADAPTER, ("ad_hh",))
    with pytest.raises(UsageError, match=r"cannot read the artefact heads-of-mine \(nor is it 16/29"):
        head_list("heads-of-mine", ADAPTER, ("ad_hh",))
    with pytest.raises(UsageError, match=r"heads='1//2'; expected entries such as"):
        head_list("1//2", ADAPTER, ("ad_hh",))
    with pytest.raises(UsageError, match=r"entry 40 lies outside the model, which has 32 dimensions"):
        sink_dims((40,), ADAPTER, ("var",))
