"""Zero-shot classification: a picture is of the class whose description its embedding is nearest to.

Protocol: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), ICML 2021,
arXiv 2103.00020; class names and templates as in github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.protocol import Control
from vislm.eval.reading import read_text
from vislm.eval.vision import imagenet

TEMPLATES = {
    "openai": "80 templates of CLIP's authors (open_clip's OPENAI_IMAGENET_TEMPLATES)",
    "simple": "the 7 best of them (open_clip's SIMPLE_IMAGENET_TEMPLATES)",
    "photo": "a photo of a {}.",
}
"""Name -> what it is."""
_SEPARATOR = "\n"


@dataclass(frozen=True)
class ZeroShot(imagenet.ImageNet):
    """Pictures to be classified by an image-text model."""

    name: str = "zero_shot"
    subject: str = "zero_shot"


def load(
    path: Path, *, variant: str = "val", classes: str = "", templates: str = "openai", control: Control = "none"
) -> ZeroShot:
    """Read pictures for zero-shot classification.

    Args:
        path: as for ``imagenet``.
        variant: val, v2, real, a, r or sketch.
        classes: for data that is not ImageNet: a file with one class folder a line and, behind a tab, its name in
            prompts; see ``class_lists.read_classes``.
        templates: openai, simple, photo, or a text file with one template a line, ``{}`` where the name goes.
        control: grey pictures or not.

    Raises:
        UnknownName: no such variant or templates.
        AnnotationError: a layout that is none of the official ones, a template without ``{}``.
    """
    read = imagenet.load(path, variant=variant, classes=classes, control=control)
    chosen = templates if templates in TEMPLATES else _SEPARATOR.join(_read_templates(templates, path))
    named = templates if templates in TEMPLATES else hashlib.sha256(chosen.encode()).hexdigest()[:16]
    return ZeroShot(
        read.pictures,
        read.classes,
        {**read.settings, "templates": named, "class_names": "file" if classes else "open_clip"},
        control,
        read.faults,
        chosen,
    )


def suspicions(task: ZeroShot) -> list[str]:
    """Return what :func:`vislm.eval.vision.imagenet.suspicions` does."""
    return imagenet.suspicions(task)


def template_lines(chosen: str) -> list[str]:
    """Return templates that are no name of :data:`TEMPLATES`, one by one."""
    return [TEMPLATES["photo"]] if chosen == "photo" else chosen.split(_SEPARATOR)


def _read_templates(file: str, root: Path) -> list[str]:
    path = next((p for p in (root / file, Path(file)) if p.is_file()), None)
    if path is None:
        raise UnknownName("templates", file, TEMPLATES, "Or a text file with one template a line.")
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines or any(line.count("{}") != 1 for line in lines):
        raise AnnotationError(f"{path}: expected one template a line, each with one {{}}; got {json.dumps(lines[:3])}")
    return lines
