"""The table of methods and families: what it says is what happens, and what docs/families.md shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vislm import attach, registry
from vislm.errors import UsageError
from vislm.lmm.adapters import FAMILIES, adapter_for
from vislm.lmm.plan import compile_plan
from vislm.support import BEGIN, END, OPTIONS, reference_adapter, support_lines, support_markdown, supported

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "lmm"))
METHODS = [(kind, name) for kind in registry.AREAS for name in registry.names(kind)]


def test_the_page_shows_the_table_of_today() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    shown = page.split(BEGIN)[1].split(END)[0].strip()
    again = "python -c \"import pathlib, vislm.support as s; s.update_page(pathlib.Path('docs/families.md'))\""
    assert shown == support_markdown().strip(), f"write it anew: {again}"


def test_every_family_has_a_reference_and_every_refusal_a_reason() -> None:
    for kind, name in METHODS:
        for family in FAMILIES:
            own = supported(kind, name, reference_adapter(family))
            assert own.works or len(own.reason) > 20, (name, family)
    assert supported("pruning", "fastv", reference_adapter("qwen3_vl")).options == "layer=3"
    tome = supported("pruning", "tome", reference_adapter("internvl"))
    assert not tome.works
    assert "pixel shuffle" in tome.reason
    assert sum(line.startswith("tome ") for line in support_lines()) == 1


def test_options_name_methods() -> None:
    assert OPTIONS.keys() <= {name for _, name in METHODS}


NOT_ON_TINY = {
    "var": "looks for activations that tiny models cannot have",
    "carve": "is a function, not a session's stage",
}

RULES_OUT_WORDS = ("dola", "opera", "pai", "vcd")
"""Methods whose cutoff gives unlikely words the logit -inf."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:vflowopt")
@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_what_plans_runs(kind, name) -> None:
    """On tiny models: a method that accepts the model generates finite numbers."""
    import test_families
    import torch
    from running import GENERATE

    known, ran = registry.options(kind, name), 0
    given = [OPTIONS.get(name, "").replace("=2/3", "=2/1")]
    if "keep" in known and not given[0].startswith("r="):
        given.append("keep=0.5")
    for family in FAMILIES:
        model = test_families.built(family)
        method = registry.build(kind, f"{name}:{','.join(filter(None, given))}")
        try:
            compile_plan([method], adapter_for(model))
        except UsageError:
            continue
        inputs, _ = test_families.mixed(family)
        if name == "opera":  # searches one sample at a time
            inputs = test_families.mixed(family)[1][0]
        with attach(model, method) as session:
            out = model.generate(**inputs, **{**GENERATE, "max_new_tokens": 2})
        logits = torch.stack(out.logits)
        if name in RULES_OUT_WORDS:
            assert not logits.isnan().any(), family
            assert not logits.isposinf().any(), family
        else:
            assert logits.isfinite().all(), family
        assert session.last_run is not None
        assert len(session.last_run.visual_tokens_kept) == (5 if name == "opera" else 3)  # an image per beam
        ran += 1
    assert ran or name in NOT_ON_TINY
