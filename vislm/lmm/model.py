"""An LMM that answers questions about images: a transformers model, its processor, and the interventions in force."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vislm.errors import UsageError
from vislm.images import load_image
from vislm.lmm.adapters import adapter_for
from vislm.lmm.interventions import Intervention
from vislm.lmm.loading import load_pretrained
from vislm.lmm.run import Run
from vislm.lmm.session import Session, attach

ImageSource = str | os.PathLike[str] | Image.Image
"""A path or an image that is already open."""


@dataclass(frozen=True)
class Answer:
    """One answer of an LMM."""

    text: str
    candidates: dict[str, float] = field(default_factory=dict)
    """Logit of each candidate word at the first answer position."""
    visual_tokens: int = 0
    """Visual tokens of the prompt."""
    visual_tokens_kept: int = 0
    """Those that were left at the end of the prefill."""
    seconds: float = 0.0
    """Wall time of the batch divided by its size."""


class LMM:
    """A model with its processor. Build it with :func:`load_lmm`."""

    def __init__(self, name: str, model: PreTrainedModel, processor: Any, identity: dict[str, str]) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.adapter = adapter_for(model)
        self._identity = identity
        self._session: Session | None = None
        self._last_run: Run | None = None
        processor.tokenizer.padding_side = "left"  # a decoder continues the last column
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @property
    def last_run(self) -> Run | None:
        """What the last call did: tokens per layer, head factors, FLOPs, bytes, seconds. None before the first."""
        return self._last_run

    @contextlib.contextmanager
    def using(self, *interventions: Intervention) -> Iterator[LMM]:
        """Answer under interventions while the context is open; contexts nest."""
        outer = self._session
        with attach(self.model, *interventions) as session:
            self._session = session
            try:
                yield self
            finally:
                self._session = outer

    def ask(self, image: ImageSource | Sequence[ImageSource] | None, question: str, **options: Any) -> str:
        """Return the answer to a question about an image, several images, or none.

        Args:
            image: a path, a PIL image, a list of them, or None.
            question: plain text.
            options: as in :meth:`ask_many`.
        """
        return self.ask_many([image], [question], **options)[0].text

    def ask_many(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource] | None],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 64,
        candidates: Sequence[str] = (),
        **generation: Any,
    ) -> list[Answer]:
        """Return one answer per question, decoded greedily unless ``generation`` says otherwise.

        Args:
            images: for each question a path, a PIL image, a list of them, or None.
            questions: plain text; a batch is padded on the left.
            max_new_tokens: upper limit of an answer.
            candidates: words whose logits at the first answer position are wanted, e.g. ("yes", "no").
            generation: further arguments of ``model.generate``, e.g. ``num_beams=3``.

        Raises:
            UsageError: the numbers of images and questions differ, or there are none.
            ImageError: an image cannot be read.
        """
        if len(images) != len(questions) or not questions:
            raise UsageError(f"{len(images)} images for {len(questions)} questions; give one image entry per question")
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens!r}: expected a whole number >= 1")
        if len(questions) > 1 and self._session is not None and self._session.one_at_a_time:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "candidates": candidates, **generation}
            pairs = zip(images, questions, strict=True)
            return [self.ask_many([image], [question], **options)[0] for image, question in pairs]
        started = time.perf_counter()
        inputs = self.prepare(images, questions)
        with contextlib.ExitStack() as stack:
            session = self._session or stack.enter_context(attach(self.model))
            session.questions = questions
            out = self.model.generate(  # pyright: ignore[reportCallIssue]
                **inputs,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=bool(candidates),
                **{"do_sample": False, **generation},
            )
            self._last_run = session.last_run
        run = self._last_run
        assert run is not None
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        seconds = (time.perf_counter() - started) / len(questions)
        before, after = self._tokens_per_sample(inputs, run)
        first = out.logits[0].float() if candidates else None
        beams = first.shape[0] // len(questions) if first is not None else 1
        return [
            Answer(
                texts[i].strip(),
                {} if first is None else self._candidate_logits(first[i * beams], candidates),
                before[i],
                after[i],
                seconds,
            )
            for i in range(len(questions))
        ]

    def prepare(
        self, images: Sequence[ImageSource | Sequence[ImageSource] | None], questions: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the model's inputs (input_ids, attention_mask, pixel_values, ...), padded on the left."""
        lists = [_as_list(entry) for entry in images]
        prompts = [self.prompt(question, len(entry)) for entry, question in zip(lists, questions, strict=True)]
        pictures: list[Any] = [[load_image(image) for image in entry] for entry in lists]
        if not self.adapter.nested_images or not any(pictures):
            pictures = [picture for entry in pictures for picture in entry]
        inputs = self.processor(images=pictures or None, text=prompts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        dtype = self.model.dtype
        return {
            k: v.to(self.model.device, dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }

    def prompt(self, question: str, images: int = 1) -> str:
        """Return the text prompt for a question about a number of images, by the processor's chat template."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        placeholders = "\n".join([self.adapter.placeholder.format(self.processor.image_token)] * images)
        return self.adapter.default_prompt.format(images=placeholders, question=question).replace("  ", " ")

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the answers besides the question: weights, dtype, interventions with all options."""
        active = self._session.plan.interventions if self._session else ()
        return {
            **self._identity,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "interventions": [repr(item) for item in active],
            "decoding": "greedy",
        }

    def _candidate_logits(self, logits: Tensor, candidates: Sequence[str]) -> dict[str, float]:
        return {word: logits[self._first_tokens(word)].max().item() for word in candidates}

    def _first_tokens(self, word: str) -> list[int]:
        """Return the first token of each way to write ``word``: capitalised or not, with or without a space."""
        tokenizer = self.processor.tokenizer
        forms = {form for w in (word, word.capitalize()) for form in (w, f" {w}")}
        tokens = {ids[0] for form in forms if (ids := tokenizer.encode(form, add_special_tokens=False))}
        known = {t for t in tokens if tokenizer.decode([t]).strip()} - {tokenizer.unk_token_id}
        if not known:
            raise UsageError(f"candidate {word!r} is not a word of the model's vocabulary")
        return sorted(known)

    def _tokens_per_sample(self, inputs: dict[str, Tensor], run: Run) -> tuple[list[int], list[int]]:
        before = self.adapter.is_visual(inputs["input_ids"]).sum(-1).tolist()
        kept, total = run.visual_tokens_kept, run.visual_tokens
        after, image = [], 0
        beams = run.batch // len(before)
        for count in before:
            left = alive = 0
            while left < count:
                left, alive, image = left + total[image], alive + kept[image], image + 1
            after.append(alive)
            image += _images_in(total, image, count * (beams - 1))
        return before, after


def _images_in(lengths: list[int], start: int, tokens: int) -> int:
    """Return how many images from ``start`` on make up ``tokens`` tokens (the copies for further beams)."""
    number = 0
    while tokens > 0:
        tokens -= lengths[start + number]
        number += 1
    return number


def _as_list(entry: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, (str, os.PathLike, Image.Image)) else list(entry)


def load_lmm(
    name: str | Path = "vislm-tiny", *, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu"
) -> LMM:
    """Load an LMM with its processor.

    Args:
        name: "vislm-tiny" (shipped with the package), a local folder in transformers' format, or the name of a model on
            the Hugging Face hub (the only case that needs the network).
        dtype: e.g. ``torch.bfloat16`` or "bfloat16"; None: the checkpoint's own, float32 for the embedded model.
        device: where to put the model.

    Raises:
        CheckpointError: no such model, weights that are not safetensors, a text-only checkpoint.
        UsageError: a model without images or of a family without adapter.
    """
    return LMM(str(name), *load_pretrained(str(name), dtype, torch.device(device)))
