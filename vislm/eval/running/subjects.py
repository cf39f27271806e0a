"""Models as the runner sees them: how each kind of subject is loaded, and what an LMM's row holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from vislm.errors import UnknownName, UsageError, VislmError
from vislm.eval.protocol import Asked, Subject

SUBJECTS = {
    "lmm": "vislm.eval.running.subjects:open_lmm",
    "classifier": "vislm.eval.vision.classifier:open_classifier",
    "detector": "vislm.eval.vision.detector:open_detector",
    "features": "vislm.eval.vision.features:open_features",
    "image_text": "vislm.eval.vision.image_text:open_image_text",
    "segmenter": "vislm.eval.vision.segmenter:open_segmenter",
    "zero_shot": "vislm.eval.vision.zero_shot_model:open_zero_shot",
}
"""Kind of subject -> "module:function" that opens one: (model, prune, heads, dtype, device) -> context of a Subject."""
MODEL_FORMS = {
    "NAME@FILE.safetensors": "vision benchmarks: a model of timm, open_clip, torchvision or vislm with local weights",
    "NAME@pretrained | @TAG": "with the library's weights, may download (timm; open_clip: TAG; torchvision: COCO_V1)",
    "NAME@random": "the same with random weights, to try a pipeline out",
    "FOLDER": "a model that timm, open_clip or transformers (ade20k) saved",
    "detections.json | MAPS": "coco_detection, ade20k: finished detections, or a folder of finished maps, to be scored",
}
"""How ``--model`` names a vision model -> what that is; options follow as ``:option=value,...``."""


RULED_OUT = -1e4
"""Logit in the rows of a word that cannot be said any more, as under VCD's and DoLa's cutoffs."""


class AnswersQuestions(Protocol):
    """What the runner needs of an LMM; ``vislm.LMM`` is one."""

    def ask_many(
        self, images: Sequence[Any], questions: Sequence[str], *, max_new_tokens: int, candidates: Sequence[str]
    ) -> Sequence[Any]:
        """Return one answer with text, candidates, visual_tokens, visual_tokens_kept and seconds per question."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the answers: weights, interventions, decoding."""
        ...


def open_subject(
    kind: str,
    model: str,
    prune: Sequence[str] = (),
    heads: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
) -> contextlib.AbstractContextManager[Subject]:
    """Open the model that a benchmark is about; interventions are in force while the context is open.

    Raises:
        UnknownName: no such kind of subject.
    """
    if kind not in SUBJECTS:
        raise UnknownName("kind of subject", kind, SUBJECTS)
    module, _, function = SUBJECTS[kind].partition(":")
    opener: Callable[..., contextlib.AbstractContextManager[Subject]] = getattr(import_module(module), function)
    return opener(model, prune, heads, dtype, device)


@contextlib.contextmanager
def open_lmm(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[Subject]:
    """Load an LMM with pruning and head methods; see :func:`open_subject`."""
    from vislm import registry
    from vislm.lmm.model import load_lmm

    methods = [registry.build("pruning", s) for s in prune] + [registry.build("heads", s) for s in heads]
    with load_lmm(model, dtype=dtype, device=device).using(*methods) as lmm:
        yield LmmSubject(lmm)


def as_subject(model: AnswersQuestions | Subject) -> Subject:
    """Wrap what answers questions; return a subject as it is.

    Raises:
        UsageError: the object is neither.
    """
    if hasattr(model, "respond"):
        return model  # pyright: ignore[reportReturnType]
    if hasattr(model, "ask_many"):
        return LmmSubject(model)  # pyright: ignore[reportArgumentType]
    raise UsageError(f"{type(model).__name__} cannot be evaluated; expected a vislm.LMM or an object with respond()")


def keep_tokens(subject: Subject) -> None:
    """Let an LMM's rows say which visual tokens were left.

    Raises:
        UsageError: the subject is no LMM.
    """
    if not isinstance(subject, LmmSubject):
        raise UsageError(f"--store-kept is for LMMs; {type(subject).__name__} has no visual tokens to store")
    subject.store_kept = True


class LmmSubject:
    """An LMM that answers by text, by candidate words or by the likelihood of whole choices."""

    def __init__(self, lmm: AnswersQuestions) -> None:
        self._lmm = lmm
        self.store_kept = False
        """Whether rows of free answers get the key "kept": see ``kept_tokens``. Changes no answer."""
        self._one_at_a_time = False

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's own fingerprint and a digest of its processor's settings."""
        processor = getattr(self._lmm, "processor", None)
        extra = {} if processor is None else {"preprocessing": _settings_digest(processor)}
        return {**self._lmm.fingerprint(), **extra}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the rows of a batch: samples with choices are scored, the others answered.

        Raises:
            VislmError: the device's memory does not suffice; names the batch size.
        """
        rows: dict[str, dict[str, Any]] = {}
        try:
            if chosen := [asked for asked in batch if asked.sample.choices]:
                rows.update(self._choose(chosen))
            if open_ended := [asked for asked in batch if not asked.sample.choices]:
                rows.update(self._answer_all(open_ended, max_new_tokens))
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise VislmError(
                f"out of memory with a batch of {len(batch)} samples: use a smaller --batch-size; finished samples are "
                "kept, and the results do not depend on it"
            ) from error
        return [rows[asked.sample.id] for asked in batch]

    def _answer_all(self, batch: Sequence[Asked], max_new_tokens: int) -> dict[str, dict[str, Any]]:
        if not self.store_kept:
            return self._answer(batch, max_new_tokens)
        if not self._one_at_a_time:
            rows, kept = self._answer(batch, max_new_tokens), self._kept(batch)
            if kept is not None:
                return {i: {**row, **kept[i]} for i, row in rows.items()}
            self._one_at_a_time = len(batch) > 1  # of a model that splits batches, only the last call is on record
            if not self._one_at_a_time:
                return rows
        found: dict[str, dict[str, Any]] = {}
        for asked in batch:
            row = self._answer([asked], max_new_tokens)[asked.sample.id]
            found[asked.sample.id] = {**row, **(self._kept([asked]) or {}).get(asked.sample.id, {})}
        return found

    def _kept(self, batch: Sequence[Asked]) -> dict[str, dict[str, Any]] | None:
        """Return the key "kept" for samples of which tokens were dropped; None if the call cannot be told apart."""
        from vislm.eval.running.kept_tokens import kept_per_picture

        found = kept_per_picture(self._lmm, [image.size for asked in batch for image in asked.images])
        if found is None:
            return None
        pictures = iter(found)
        of_sample = {asked.sample.id: [next(pictures) for _ in asked.images] for asked in batch}
        return {i: {"kept": kept} if any(kept) else {} for i, kept in of_sample.items()}

    def _answer(self, batch: Sequence[Asked], max_new_tokens: int) -> dict[str, dict[str, Any]]:
        words = list(dict.fromkeys(word for asked in batch for word in asked.sample.candidates))
        answers = self._lmm.ask_many(
            [_pictures(asked) for asked in batch],
            [asked.sample.prompt for asked in batch],
            max_new_tokens=max_new_tokens,
            candidates=words,
        )
        cost = _cost(self._lmm, len(batch))
        return {
            asked.sample.id: {
                "text": answer.text,
                "candidates": _logits(answer.candidates, asked.sample.candidates),
                "visual_tokens": answer.visual_tokens,
                "visual_tokens_kept": answer.visual_tokens_kept,
                "seconds": answer.seconds,
                **cost,
            }
            for asked, answer in zip(batch, answers, strict=True)
        }

    def _choose(self, batch: Sequence[Asked]) -> dict[str, dict[str, Any]]:
        from vislm.eval.running.likelihood import likelihoods

        scored = likelihoods(
            self._lmm,
            [_pictures(asked) for asked in batch],
            [asked.sample.prompt for asked in batch],
            [asked.sample.choices for asked in batch],
        )
        return {
            asked.sample.id: {
                "text": asked.sample.choices[max(range(len(values)), key=values.__getitem__)],
                "likelihoods": values,
                "visual_tokens": answer.visual_tokens,
                "visual_tokens_kept": answer.visual_tokens_kept,
                "seconds": answer.seconds * len(values),
            }
            for asked, (values, answer) in zip(batch, scored, strict=True)
        }


def _logits(found: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Return the words' logits as JSON knows them: a word that a method rules out has ``RULED_OUT``, not -infinity."""
    return {w: max(found[w], RULED_OUT) for w in words if w in found and not math.isnan(found[w])}


def _pictures(asked: Asked) -> Any:
    """Return one picture as itself, several as a list, none as None."""
    return asked.images[0] if len(asked.images) == 1 else list(asked.images) or None


def _cost(lmm: Any, batch: int) -> dict[str, Any]:
    """Return FLOPs and phase times per sample of the call that was just made, where the model records them."""
    run = getattr(lmm, "last_run", None)
    if run is None or not run.flops:
        return {}
    return {
        "flops": round((run.flops["tower"] + run.flops["prefill"]) / batch),
        "phases": {phase: seconds / batch for phase, seconds in run.seconds.items()},
    }


def _settings_digest(processor: Any) -> str:
    """Return 16 digits that change with the settings of the image processor, the vocabulary or the chat template."""
    pictures, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", ())
    settings = [
        getattr(pictures, "to_dict", dict)(),
        [type(tokenizer).__name__, len(tokenizer), getattr(tokenizer, "special_tokens_map", {})],
        getattr(processor, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
