"""VHR's fixtures: the selection rule, and a small decoder that generates under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vislm.golden.checks._models import llama
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact
from vislm.heads import vhr
from vislm.heads.vhr import VHR
from vislm.lmm.session import attach

STDS = ("sample", "population")
STREAMS = ("both", "image_only")


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by the tensors that they hold."""
    if "head_out_image" in fixture.inputs:
        yield from _heads(fixture)
    elif "image_embeds" in fixture.inputs:
        yield from _decoder(fixture)
    else:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known VHR fixture")


def _heads(fixture: Fixture) -> Iterator[Comparison]:
    image, text = fixture.inputs["head_out_image"], fixture.inputs["head_out_text_only"]
    out, options = fixture.outputs, fixture.kwargs
    vhd, activity = vhr.divergence(image, text), vhr.text_norm(text)
    yield difference("vhd", vhd, out["vhd"], 1e-5)
    yield difference("text_only_sq_norm", activity, out["text_only_sq_norm"], 1e-4)
    for std in STDS:
        outlier = vhr.outliers(vhd, activity, std)
        selected = vhr.select_heads(vhd, outlier)
        if f"outlier_{std}_std" in out:
            yield exact(f"outlier_{std}_std", outlier, out[f"outlier_{std}_std"])
        if f"selected_{std}_std" in out:
            yield exact(f"selected_{std}_std", selected, out[f"selected_{std}_std"])
        if f"scaled_{std}_std" in out:
            factors = torch.where(selected, options["alpha"], 1.0)
            scaled = fixture.inputs["head_out_all_positions"] * factors[:, None, None, :, None]
            yield difference(f"scaled_{std}_std", scaled, out[f"scaled_{std}_std"], 1e-5)
    if "t_vhd" in out:
        yield difference("t_vhd", vhr.token_divergence(vhd, options["t_vhd_k"]), out["t_vhd"], 1e-4)


def _decoder(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    for stream in STREAMS:
        if f"{stream}.step_logits" not in out:
            continue
        logits, tokens, vhd, selected = _generate(fixture, stream, range(_depth(fixture)))
        layers = sorted(options["layers"])
        yield exact(f"{stream}.tokens", tokens, out[f"{stream}.tokens"])
        yield difference(f"{stream}.step_logits", logits, out[f"{stream}.step_logits"][: len(logits)], 1e-4)
        yield difference(f"{stream}.vhd", vhd[layers], out[f"{stream}.vhd"][layers], 1e-4)
        yield exact(f"{stream}.selected", selected[layers], out[f"{stream}.selected"][layers])


def _depth(fixture: Fixture) -> int:
    return 1 + max(int(k.split(".")[2]) for k in fixture.params if k.startswith("model.layers."))


def _generate(fixture: Fixture, stream: str, depth: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    params, options, inputs = fixture.params, fixture.kwargs, fixture.inputs
    table = params["model.embed_tokens.weight"]
    shape = {
        "hidden_size": table.shape[1],
        "intermediate_size": params["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len(depth),
        "num_attention_heads": options["num_heads"],
        "num_key_value_heads": options["num_kv_heads"],
        "head_dim": options["head_dim"],
        "rms_norm_eps": options["rms_norm_eps"],
        "rope_theta": options["rope_theta"],
    }
    model = llama(params, shape, table, len(inputs["image_embeds"]))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the placeholder's row stays zero
        model.lm_head.weight[: len(table)] = params["lm_head.weight"]
    placeholder = torch.full((len(inputs["image_embeds"]),), len(table))
    ids = torch.cat([inputs["ids_before_image"], placeholder, inputs["ids_after_image"]]).unsqueeze(0)
    images = {"image": BaseModelOutputWithPooling(pooler_output=[inputs["image_embeds"]])}  # pyright: ignore[reportArgumentType]
    choices: dict[str, Any] = {"text_stream": stream, "std": options.get("std", "sample")}
    method = VHR(alpha=options["alpha"], layers=tuple(options["layers"]), **choices)
    model.generation_config.eos_token_id = None
    with torch.no_grad(), attach(model, method) as session:
        generated = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=ids,
            mm_encoder_outputs=images,
            max_new_tokens=options["new_tokens"] + 1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=[len(table)],
        )
        assert session.last_run is not None
        memory = session.last_run.memory[0]
    logits = torch.cat(generated.logits)[:, : len(table)]
    tokens = generated.sequences[0, ids.shape[1] :][: options["new_tokens"]]
    missing = torch.full((options["num_heads"],), torch.nan)
    vhd = torch.stack([memory["vhd"].get(n, missing[None])[0] for n in depth])
    selected = torch.stack([memory["selected"][n][0] if n in memory["selected"] else missing.isinf() for n in depth])
    return logits, tokens, vhd, selected
