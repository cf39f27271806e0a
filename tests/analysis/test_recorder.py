"""The recorder against explicit matrices, and that it changes nothing."""

from __future__ import annotations

import analysis_eager as eager
import models
import pytest
import torch
from running import hook_count, implementations, one_image

from vislm import VHR, FastV, FlowCut, attach
from vislm.analysis.entropy import head_entropy
from vislm.analysis.groups import GROUPS
from vislm.analysis.recorder import QUERIES, Recorder, recorded
from vislm.analysis.records import Sample
from vislm.analysis.visual import carve_entropy, visual_entropy
from vislm.errors import PlanConflict, UsageError
from vislm.heads.vhr import divergence

NEW = 8


def generate(model, inputs, *methods, **options):
    with attach(model, *methods) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
        return out, session.last_run


def everything(**options) -> Recorder:
    return Recorder("maps", columns=True, divergence=True, sink_dims=(1, 5), tau=1.5, keep_calls=True, **options)


def test_reductions_rows_and_maps_equal_the_matrices() -> None:
    model, inputs = models.llava(), one_image("llava")
    out, run = generate(model, inputs, everything())
    recording, length = recorded(run), inputs["input_ids"].shape[1]
    image = inputs["input_ids"][0] == models.IMAGE_TOKEN
    for step in range(NEW):
        ids = out.sequences[:, : length + step]
        _, matrices = eager.forward(model, {**inputs, "input_ids": ids})
        for layer, matrix in matrices.items():
            found, row = recording.steps[step][layer], matrix[:, :, -1]
            on_image = torch.cat([image, torch.zeros(step, dtype=torch.bool)])
            torch.testing.assert_close(found.row, row, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.image_row, row[..., on_image], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.mass[..., GROUPS.index("image")], row[..., on_image].sum(-1))
            torch.testing.assert_close(found.mass.sum(-1), torch.ones(1, 4))
            generated = row[..., length:].sum(-1)
            torch.testing.assert_close(found.mass[..., GROUPS.index("generated")], generated, atol=1e-6, rtol=1e-4)
            assert torch.equal(found.top_key, row.argmax(-1))
            torch.testing.assert_close(found.visual_entropy, visual_entropy(row[:, :, None], on_image[None])[..., 0])
            torch.testing.assert_close(found.carve_entropy, carve_entropy(row[:, :, None], on_image[None])[:, 0])
    _, matrices = eager.forward(model, inputs)
    for layer, matrix in matrices.items():
        found, hidden = recording.prefill[layer], matrix
        torch.testing.assert_close(found.map, matrix, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.received, matrix.sum(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.row_entropy, -torch.xlogy(hidden, hidden).sum(-1), atol=1e-5, rtol=1e-4)
        exact = head_entropy(matrix)
        assert found.entropy is not None
        torch.testing.assert_close(found.entropy.column_max, exact.column_max, atol=1e-5, rtol=1e-4)
        flow = matrix[:, :, image][..., image].sum(-1).mean(-1)
        place = QUERIES.index("image"), GROUPS.index("image")
        torch.testing.assert_close(found.flow[..., place[0], place[1]], flow, atol=1e-5, rtol=1e-4)
        assert found.flow[..., QUERIES.index("system"), :].isnan().all()


def test_it_changes_no_number_and_leaves_nothing_behind() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _ = generate(model, inputs)
    before = hook_count(model), implementations(model)  # transformers adds some of its own in the first forward
    for recorder in (Recorder(), everything()):
        same, _ = generate(model, inputs, recorder)
        assert torch.equal(torch.stack(plain.logits), torch.stack(same.logits))
    assert (hook_count(model), implementations(model)) == before


def test_levels_keep_only_what_they_say() -> None:
    model, inputs = models.llava(), one_image("llava")
    reductions = recorded(generate(model, inputs, Recorder())[1])
    assert all(step.row is None and step.image_row is None for layers in reductions.steps for step in layers.values())
    assert all(record.map is None and record.call is None for record in reductions.prefill.values())
    rows = recorded(generate(model, inputs, Recorder("last_rows", layers=(1, 3)))[1])
    assert sorted(rows.prefill) == [1, 3]
    assert rows.over_steps("image_row").shape == (NEW, 2, 4, models.PATCHES)
    tokens = inputs["input_ids"].shape[1]
    with pytest.raises(UsageError, match=f"5 layers and {tokens} tokens take"):
        generate(model, inputs, Recorder("maps", limit=5 * 4 * tokens * tokens * 4 - 1))
    generate(model, inputs, Recorder("maps", limit=5 * 4 * tokens * tokens * 4))


def test_a_left_padded_batch_gives_what_its_samples_give_alone() -> None:
    model = models.llava()
    prompts = [models.prompt(7, 8, 9, 10), models.prompt(9), torch.tensor([[1, 5, 6, 7, 8]])]
    pixels = models.pixels(2)
    together = recorded(generate(model, {**models.left_pad(*prompts), "pixel_values": pixels}, everything())[1])
    for sample, ids in enumerate(prompts):
        inputs = {"input_ids": ids, **({} if sample == 2 else {"pixel_values": pixels[sample : sample + 1]})}
        alone, length = recorded(generate(model, inputs, everything())[1]), ids.shape[1]
        for layer in range(5):
            own, mine = together.prefill[layer], alone.prefill[layer]
            torch.testing.assert_close(own.received[sample, :, -length:], mine.received[0], atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(own.flow[sample], mine.flow[0], atol=2e-4, rtol=2e-4, equal_nan=True)
            torch.testing.assert_close(own.value_ratio[sample], mine.value_ratio[0], atol=2e-4, rtol=2e-4)
            assert own.entropy is not None
            assert mine.entropy is not None
            torch.testing.assert_close(own.entropy.row_mean[sample], mine.entropy.row_mean[0], atol=2e-4, rtol=2e-4)
            for step in (0, NEW - 1):
                one, two = together.steps[step][layer], alone.steps[step][layer]
                torch.testing.assert_close(one.mass[sample], two.mass[0], atol=2e-4, rtol=2e-4)
                torch.testing.assert_close(one.head_norm[sample], two.head_norm[0], atol=2e-4, rtol=2e-4)


def test_divergence_is_the_distance_of_two_prefills() -> None:
    model, inputs = models.llava(), one_image("llava")
    recording = recorded(generate(model, inputs, Recorder(divergence=True))[1])
    outputs: list[list[torch.Tensor]] = []
    text = {"input_ids": inputs["input_ids"][:, inputs["input_ids"][0] != models.IMAGE_TOKEN]}
    for prompt in (inputs, text):
        seen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0][:, -1]))
            for layer in model.model.language_model.layers
        ]
        with torch.no_grad():
            model(**prompt)
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    for layer, (image, without) in enumerate(zip(*outputs, strict=True)):
        expected = divergence(image.unflatten(-1, (4, -1)), without.unflatten(-1, (4, -1)))
        torch.testing.assert_close(recording.divergence[layer], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pruner", [FlowCut(keep=6), FastV(keep=5)])
def test_behind_a_pruner_tokens_keep_their_places(pruner) -> None:
    model, inputs = models.llava(), one_image("llava")
    _, run = generate(model, inputs, pruner, Recorder("last_rows"))
    recording = recorded(run)
    assert run is not None
    kept = set(run.stages[-1].index[0])
    sample = Sample(None, "", [], recording, [], models.PATCHES)
    rows = sample.image_rows()
    assert rows.shape == (NEW, 5, 4, models.PATCHES)
    dropped = [n for n in range(models.PATCHES) if n not in kept]
    assert rows[:, -1][..., dropped].abs().max() == 0
    assert rows[:, -1][..., sorted(kept)].sum() > 0


def test_with_vhr_the_norms_are_those_before_scaling() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain = recorded(generate(model, inputs, Recorder())[1])
    scaled = recorded(generate(model, inputs, VHR(alpha=3.0, layers=(0,)), Recorder())[1])
    torch.testing.assert_close(scaled.step("head_norm")[0], plain.step("head_norm")[0])
    assert not torch.allclose(scaled.step("head_norm")[2], plain.step("head_norm")[2])


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
def test_static_caches_and_beams(options) -> None:
    model, inputs = models.llava(), one_image("llava")
    plain = recorded(generate(model, inputs, Recorder("last_rows"))[1])
    other = recorded(generate(model, inputs, Recorder("last_rows"), **options)[1])
    torch.testing.assert_close(other.step("mass"), plain.step("mass"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.over_steps("mass").sum(-1), torch.ones(len(other.steps), 5, 4))


def test_bfloat16_reductions_are_finite_float32() -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    recording = recorded(generate(model, inputs, everything())[1])
    for record in recording.prefill.values():
        assert record.received.dtype == torch.float32
        assert record.received.isfinite().all()
    assert recording.over_steps("mass").isfinite().all()


def test_refusals() -> None:
    model, inputs = models.llava(), one_image("llava")
    with pytest.raises(UsageError, match="level='rows'"):
        generate(model, inputs, Recorder("rows"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"dimensions 0\.\.31"):
        generate(model, inputs, Recorder(sink_dims=(40,)))
    with pytest.raises(PlanConflict, match="decoder layers"):
        generate(model, inputs, Recorder(layers=(9,)))
    with pytest.raises(UsageError, match="no recorder"):
        recorded(generate(model, inputs)[1])
