"""A checkpoint folder of every family, with its processor: questions about images in plain text."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import transformers
from PIL import Image
from running import KeepGiven

from vislm import FastV, load_lmm
from vislm.lmm.loading import EMBEDDED

SMALL = {"height": 32, "width": 32}
QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 32 * 32}}


def _qwen(kind: str):
    def build(tokenizer):
        images = transformers.Qwen2VLImageProcessor(**QWEN)
        videos = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
        return getattr(transformers, f"{kind}Processor")(images, tokenizer, videos)

    return build


def _tiled(kind: str, **options):
    def build(tokenizer):
        images = getattr(transformers, f"{kind}ImageProcessor")(
            size=SMALL, crop_size=SMALL, image_grid_pinpoints=families.PINPOINTS
        )
        return getattr(transformers, f"{kind}Processor")(images, tokenizer, **options)

    return build


def _onevision(tokenizer):
    images = transformers.LlavaOnevisionImageProcessor(size=SMALL, image_grid_pinpoints=families.PINPOINTS)
    videos = transformers.LlavaOnevisionVideoProcessor(size=SMALL)
    return transformers.LlavaOnevisionProcessor(
        images, tokenizer, videos, 16, "full", vision_aspect_ratio="anyres_max_2"
    )


def _internvl(tokenizer):
    images = transformers.GotOcr2ImageProcessor(size=SMALL, max_patches=4)
    return transformers.InternVLProcessor(images, tokenizer, transformers.InternVLVideoProcessor(size=SMALL), 16)


def _idefics(tokenizer):
    side = {"longest_edge": 32}
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size=side)
    return transformers.Idefics3Processor(images, tokenizer, 16)


TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
PROCESSORS = {
    "llava_next": (
        _tiled("LlavaNext", patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1),
        {},
    ),
    "llava_onevision": (_onevision, {"video_token": "<video>"}),
    "qwen2_vl": (_qwen("Qwen2VL"), {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "qwen2_5_vl": (_qwen("Qwen2_5_VL"), {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "qwen3_vl": (_qwen("Qwen3VL"), {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "internvl": (
        _internvl,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "idefics3": (_idefics, {}),
}
WORDS = [
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *TILES,
]


@pytest.fixture(scope="module", params=PROCESSORS)
def lmm(request, tmp_path_factory):
    """The family's tiny model and processor, saved and loaded again."""
    build, named = PROCESSORS[request.param]
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED["vislm-tiny"], extra_special_tokens=named)
    tokenizer.add_tokens(WORDS, special_tokens=True)
    tokenizer.chat_template = None
    processor = build(tokenizer)
    config = copy.deepcopy(families.build(request.param).config)
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.max_position_embeddings = 1024
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if hasattr(config, "video_token_id"):
        config.video_token_id = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "video_token", "<video>"))
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_lmm(folder)


def _picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def test_questions_with_one_two_and_no_images(lmm) -> None:
    images = [_picture(64, 40), [_picture(32, 32), _picture(30, 70)], None]
    questions = ["Is there a dog?", "Which is larger?", "What is two and two?"]
    whole = lmm.ask_many(images, questions, max_new_tokens=3)
    counts = [answer.visual_tokens for answer in whole]
    assert counts[0] > 0
    assert counts[1] > 0
    assert counts[2] == 0
    assert len(lmm.last_run.visual_tokens) == 3
    with lmm.using(KeepGiven((0, 1, 2)), FastV(keep=2, layer=2)):
        pruned = lmm.ask_many(images, questions, max_new_tokens=3)
    assert [answer.visual_tokens for answer in pruned] == counts
    assert [answer.visual_tokens_kept for answer in pruned] == [2, 4, 0]
    assert pruned[2].text == whole[2].text


def test_the_prompt_without_a_chat_template_holds_the_placeholders(lmm) -> None:
    prompt = lmm.prompt("Is there a dog?", 2)
    assert prompt.count(lmm.processor.image_token) == 2
    assert "Is there a dog?" in prompt
    assert "  " not in prompt
