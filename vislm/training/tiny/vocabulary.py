"""The 85 words of vislm-tiny and its processor."""

from __future__ import annotations

from typing import Any

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import COLOURS
from vislm.data.turns import plural

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
_SENTENCES = (
    "user : assistant is there a in the image ? yes no . how many are zero one two three what color where top bottom "
    "left right describe and ,"
)
_EASY_VQA = "black brown circle contain does gray not of present rectangle shape teal triangle"
WORDS = sorted({*_SENTENCES.split(), *_EASY_VQA.split(), *CATEGORIES, *map(plural, CATEGORIES), *COLOURS})
IDS = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
"""Token -> id; 85 of them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.first %}<s> {% endif %}user :"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% else %} assistant :"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}{% endif %} </s> "
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def encode(text: str) -> list[int]:
    """Return the ids of lower-case, space-separated text; every word must be known."""
    return [IDS[word] for word in text.split()]


def build_processor() -> Any:
    """Return a ``LlavaProcessor``: words in any case and with punctuation attached, images of any size to 64 x 64."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    core = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    size = {"height": 64, "width": 64}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
