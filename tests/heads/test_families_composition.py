"""Any head method with any pruner, and any two head methods: they run, or are refused by both names."""

from __future__ import annotations

import itertools

import pytest
import torch
from family_cases import CASES
from family_eager import language_model, sample
from running import generate

from vislm import VHR, attach, registry
from vislm.errors import PlanConflict
from vislm.support import OPTIONS

PRUNERS = registry.names("pruning")
NEEDS_EVERY_TOKEN = {"imbalanced"}
"""Methods that speak of single image tokens, which a pruner takes away."""
LAYERS = {
    "act": {(1, 2), (3, 0), (3, 3)},
    "ad_hh": {(1, 2), (3, 0), (3, 3)},
    "zerotuning": {(0, 1), (2, 0), (2, 3)},
    **{key: set(itertools.product((1, 2, 4), range(4))) for key in ("imbalanced", "vaf")},
    "air": set(itertools.product((1, 2, 3, 4), range(4))),
    "ilvad": set(itertools.product((1, 2, 3), range(4))),
    "pai": set(itertools.product((1, 3), range(4))),
    "spin": set(itertools.product(range(5), range(4))),
    "var": set(itertools.product((2, 3), range(4))),
}
"""Heads whose rows a method's case edits; two owners of one row are refused."""
ALSO_REFUSED = [{"pai", "vcd"}, {"ilvad", "opera"}]
"""Two contrast streams; a record of every token, and a search that takes tokens back."""
PAIRS = list(itertools.combinations(CASES, 2))


def pruner(name: str):
    known = registry.options("pruning", name)
    given = [OPTIONS.get(name, ""), "keep=0.5" if "keep" in known and name != "tome" else ""]
    return registry.build("pruning", f"{name}:{','.join(filter(None, given))}")


def runs(*methods) -> bool:
    """Whether the methods are accepted together; if so their answer has logits, if not both are named."""
    own = sample("llava")
    try:
        with attach(own.model, *methods):
            pass
    except PlanConflict as conflict:
        message = str(conflict)
        assert all(method.name in message for method in methods), message
        return False
    logits, _, run = generate(own.model, own.inputs, *methods, max_new_tokens=3)
    assert not logits.isnan().any()
    assert not logits.isposinf().any()
    assert logits.isfinite().any(-1).all()
    assert run.memory is not None
    return True


@pytest.mark.filterwarnings("ignore:vflowopt")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("other", PRUNERS)
def test_with_any_pruner(name: str, other: str) -> None:
    """An image key that was pruned away is no method's own: such a pair is refused."""
    assert runs(pruner(other), CASES[name].method) == (name not in NEEDS_EVERY_TOKEN)


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_two_head_methods(name: str, other: str) -> None:
    refused = {name, other} in ALSO_REFUSED or LAYERS.get(name, set()) & LAYERS.get(other, set())
    assert runs(CASES[name].method, CASES[other].method) == (not refused)


@pytest.mark.parametrize("other", ["restore", "staged"])
def test_the_text_only_stream_has_no_pruner(other: str) -> None:
    """VHR's stream beside the prompt has no image to prune: what it is compared with is the plain text-only prompt."""
    own, method = sample("llava"), VHR(layers=(1,), outlier_rule=False)
    seen: dict[str, torch.Tensor] = {}

    def look(where: str):
        return lambda module, args: seen.__setitem__(where, args[0][0, -1].unflatten(-1, (4, -1)))

    projection = language_model(own.model).layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(look("text"))
    with torch.no_grad():
        own.model(**own.without_image(torch.tensor([], dtype=torch.long)))
    hook.remove()
    for order in ((pruner(other), method), (method, pruner(other))):
        hook = projection.register_forward_pre_hook(look("image"))
        generate(own.model, own.inputs, pruner(other), max_new_tokens=1)
        hook.remove()
        _, _, run = generate(own.model, own.inputs, *order, max_new_tokens=1)
        vhd = run.memory[order.index(method)]["vhd"][1][0]
        torch.testing.assert_close(vhd, (seen["image"] - seen["text"]).norm(dim=-1), atol=1e-5, rtol=1e-4)
