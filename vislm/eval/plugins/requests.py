"""What lmms-eval asks for, and how: request tuples, generation settings, stop strings. Imports nothing of lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vislm.errors import UsageError

_MOST_TOKENS = 1024
"""Of tasks that set no limit."""
_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Request:
    """Stands in for lmms-eval's ``Instance``, of which only ``args`` is read."""

    args: tuple[Any, ...]


@dataclass(frozen=True)
class Generation:
    """How an answer is to be generated."""

    max_new_tokens: int
    until: tuple[str, ...]
    options: Mapping[str, Any]
    """Further arguments of ``model.generate``."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Generation:
        """Read a task's gen_kwargs, which stay as they are.

        Greedy unless ``do_sample`` with a temperature above 0 is asked for; a temperature above 0 alone asks for it, as
        in lmms-eval's own models. Keys that only other models know (``image_aspect_ratio``, ...) are left out.

        Raises:
            UsageError: a limit or stop strings that cannot be read.
        """
        limit = given.get("max_new_tokens", given.get("max_gen_toks", _MOST_TOKENS))
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise UsageError(f"max_new_tokens={limit!r}: expected a whole number >= 1")
        until = given.get("until") or []
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
            raise UsageError(f"until={until!r}: expected a text or a list of texts")
        options = {name: given[name] for name in _PASSED if given.get(name) is not None}
        warm = given.get("temperature")
        if given.get("do_sample", bool(warm)) and warm != 0:
            options |= {"do_sample": True, **{n: given[n] for n in _SAMPLING if given.get(n) is not None}}
        return cls(limit, tuple(stop for stop in until if stop), options)

    @property
    def key(self) -> str:
        """Equal for requests that may share a batch."""
        return json.dumps([self.max_new_tokens, dict(self.options)], sort_keys=True, default=str)

    def cut(self, text: str) -> str:
        """Return the text up to the first stop string; all of it where a task names none (long captions stay whole)."""
        places = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(places)].strip() if places else text


@dataclass(frozen=True)
class Question:
    """One prompt with its pictures."""

    text: str
    images: list[Image.Image]


def question(context: str, visuals: Any) -> Question:
    """Return the prompt of a request.

    The model's own placeholders go in front of the text, so ``<image>`` marks in it are taken out.

    Raises:
        UsageError: videos or sounds.
    """
    visuals = [] if visuals is None else list(visuals)
    flat = [v for entry in visuals for v in (entry if isinstance(entry, (list, tuple)) else [entry])]
    other = [type(v).__name__ for v in flat if not isinstance(v, Image.Image)]
    if other:
        raise UsageError(f"the task shows {other[0]} objects; vislm answers questions about pictures only")
    return Question(context.replace(PLACEHOLDER, "").strip() if flat else context, flat)


def in_batches(keys: Sequence[str], texts: Sequence[str], size: int) -> list[list[int]]:
    """Return batches of places: requests of one key together, long texts first, which pads least."""
    order = sorted(range(len(keys)), key=lambda n: (keys[n], -len(texts[n]), n))
    found: list[list[int]] = []
    for n in order:
        if found and keys[found[-1][0]] == keys[n] and len(found[-1]) < size:
            found[-1].append(n)
        else:
            found.append([n])
    return found


def target_text(target: str | Callable[[Any], Any], document: Callable[[], Any]) -> str:
    """Return the continuation of a likelihood request, which may be given as a function of the document."""
    return str(target(document())) if callable(target) else target
