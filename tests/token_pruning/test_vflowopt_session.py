"""VFlowOpt on tiny models, and its golden checks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from running import GENERATE, generate, mixed_batch
from safetensors import safe_open
from safetensors.torch import save_file

from vislm import attach
from vislm.errors import PlanConflict, UsageError
from vislm.golden import verify_folder
from vislm.lmm.interventions import Alive, LanguageStage, PromptStage
from vislm.token_pruning.vflowopt import VFlowOpt

FIXTURES = sorted((Path(__file__).parents[1] / "golden" / "vflowopt").glob("*.safetensors"))
NAMES = ("llava", "llava_next", "llava_onevision", "internvl", "smolvlm")


@dataclass(frozen=True)
class Watched:
    """VFlowOpt whose views are kept."""

    method: VFlowOpt
    prompt: list = field(default_factory=list)
    later: list = field(default_factory=list)
    name = "vflowopt"

    def plan(self, adapter):
        for stage in self.method.plan(adapter):
            if isinstance(stage, PromptStage):
                yield replace(stage, select=partial(self._seen, stage, self.prompt))
            elif isinstance(stage, LanguageStage):
                yield replace(stage, select=partial(self._seen, stage, self.later))

    def _seen(self, stage, views, view):
        chosen = stage.select(view)
        views.append((view, chosen))
        return chosen


def one_image(name: str, shape: int = 0, seed: int = 0):
    return families.inputs(name, ([families.FAMILIES[name].picture(shape, seed)], [7, 8, 9]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [1.0, 10_000])
def test_keeping_everything_is_bit_identical(name, keep) -> None:
    model, inputs = families.build(name), one_image(name)
    if keep == 10_000 and name == "llava":
        keep = 16  # a budget beyond the only possible number of tokens is an error
    plain = torch.stack(model.generate(**inputs, **GENERATE).logits)
    logits, _, run = generate(model, inputs, VFlowOpt(keep=keep, t=1.0))
    assert torch.equal(plain, logits)
    assert run.visual_tokens_kept == run.visual_tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_later_stages_keep_the_most_important_survivors(name, alpha) -> None:
    model, inputs = families.build(name), one_image(name)
    method = Watched(VFlowOpt(R1=0.7, R2=0.6, R3=0.5, a=2.0, t=1.0, alpha=alpha, pixels="unit"))
    logits, _, run = generate(model, inputs, method)
    assert logits.isfinite().all()
    ((view, selection),) = method.prompt
    score = view.memory["importance"][0]
    alive = selection.keep.nonzero().flatten()
    text = run.prompt_tokens - len(score)
    counts = [len(alive)]
    for (_, keep), ratio in zip(method.later, (0.6, 0.5), strict=True):
        left = len(alive) - round(len(alive) * (1.0 - ratio))
        alive = alive[score[alive].argsort(descending=True, stable=True)[:left]].sort().values
        counts.append(left)
        assert int(keep.sum()) == text + left
    assert run.stages[-1].index == [alive.tolist()]
    assert run.layer_tokens == [text + counts[0], text + counts[1], *[text + counts[2]] * 3]


def test_newlines_have_the_highest_importance_and_stay() -> None:
    model, inputs = families.build("llava_next"), one_image("llava_next")
    method = Watched(VFlowOpt(R1=0.3, a=3.0, t=1.0, keep=0.3))
    generate(model, inputs, method)
    ((view, selection),) = method.prompt
    newlines = ~view.candidates
    assert newlines.any()
    assert (view.memory["importance"][0][newlines] == 1.0).all()
    assert selection.keep[newlines].all()
    assert torch.equal(selection.features[selection.size == 1], view.features[selection.keep][selection.size == 1])


def test_the_tower_map_uses_the_layer_that_is_asked_for() -> None:
    model, inputs = families.build("llava"), one_image("llava")
    scores = []
    for layer in (None, 4, 1):
        method = Watched(VFlowOpt(keep=0.5, t=1.0, layer=layer))
        generate(model, inputs, method)
        scores.append(method.prompt[0][0].memory["importance"][0])
    assert torch.equal(scores[0], scores[1])  # the read layer of six is the second last
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": 6}, {"keep": 0.5, "recycle": False}])
def test_batch_equals_singles(options) -> None:
    model, method = families.build("llava"), VFlowOpt(a=2.0, t=1.0, **options)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single.stages[-1].index if single.stages else []
    assert run.stages[-1].index == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(dtype) -> None:
    model = families.build("llava", dtype=dtype)
    inputs = families.inputs("llava", ([families.FAMILIES["llava"].picture(0, 0)], [7, 8]), dtype=dtype)
    logits, _, _ = generate(model, inputs, VFlowOpt(keep=0.4, a=2.0, t=1.0, alpha=0.2))
    assert logits.isfinite().all()


def test_recycling_changes_what_the_cells_hold_and_calibration_how_much_it_weighs() -> None:
    model, inputs = families.build("llava"), one_image("llava")
    answers = [
        generate(model, inputs, VFlowOpt(R1=0.5, keep=0.5, a=2.0, t=1.0, **options))[0]
        for options in ({}, {"recycle": False}, {"calibrate": True})
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    assert (answers[0] - answers[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("recycle", [True, False])
def test_counts_expected_ahead_of_a_run(name, recycle) -> None:
    model, inputs = families.build(name), one_image(name)
    method = VFlowOpt(keep=0.5, a=4.0, t=1.0, recycle=recycle)
    _, _, run = generate(model, inputs, method)
    with attach(model) as session:
        adapter = session.adapter
    with torch.no_grad():
        encoded = model.model.get_image_features(**{k: v for k, v in inputs.items() if "input" not in k}).pooler_output
    total = run.visual_tokens[0]
    alive, counts = Alive(total, total, grids=tuple(adapter.grids(encoded[0]))), []
    for stage in method.plan(adapter):
        counts.append(stage.expected(alive))
        alive = Alive(counts[-1], total)
    kept = [len(stage.index[0]) for stage in run.stages]
    assert counts == kept if not recycle else all(k <= c <= k + 4 for k, c in zip(kept, counts, strict=True))


def test_the_official_layer_without_mask() -> None:
    model, inputs = families.build("llava"), one_image("llava")
    options = {"keep": 0.5, "t": 1.0, "layers": (2, 3)}
    plain, _, run = generate(model, inputs, VFlowOpt(**options))
    quirk, _, same = generate(model, inputs, VFlowOpt(**options, unmasked_layer=True))
    assert run.layer_tokens == same.layer_tokens
    assert (plain - quirk).abs().max() > 1e-3
    with pytest.raises(UsageError, match="batch of one"):
        generate(model, mixed_batch()[0], VFlowOpt(**options, unmasked_layer=True))
    with (
        pytest.raises(PlanConflict, match="needs a layer before stage 2"),
        attach(model, VFlowOpt(layers=(0, 3), unmasked_layer=True)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"R1": 0.0}, "R1=0.0: expected a share"),
        ({"R3": 1.5}, "R3=1.5: expected a share"),
        ({"a": 0.5}, "a >= 1"),
        ({"t": -1.0}, "t >= 0"),
        ({"layers": (3,)}, "expected two of 0..4"),
        ({"layers": (3, 2)}, "expected two of 0..4"),
        ({"layer": 6}, "layers 0..5"),
        ({"keep": 0.2, "R1": 0.9}, "R3 would be"),
    ],
)
def test_impossible_options(options, message) -> None:
    with pytest.raises(UsageError, match=message), attach(families.build("llava"), VFlowOpt(**options)):
        pass


def test_pixels_that_the_processor_cuts_up_have_no_entropy() -> None:
    model, inputs = families.build("qwen2_vl"), one_image("qwen2_vl")
    with pytest.raises(UsageError, match="set alpha=0"):
        generate(model, inputs, VFlowOpt(keep=0.5, t=1.0, alpha=0.1))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_any_changed_output_is_noticed(path, tmp_path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith("out.")]
    for name in names:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 0.1 if changed.is_floating_point() else 1
        save_file({**tensors, name: changed}, tmp_path / "case.safetensors", metadata)
        (verdict,) = verify_folder(tmp_path)
        assert [c.name for c in verdict.comparisons if not c.passed] == [name.removeprefix("out.")]
