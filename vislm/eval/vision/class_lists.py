"""Which classes there are, and which picture is of which: ImageNet's lists, and lists in files of the user's.

The 1000 synset ids in their order and the classes of ImageNet-A and -R come with timm, and are read without importing
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UsageError
from vislm.eval.protocol import Sample
from vislm.eval.reading import read_json, read_text


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of a model's outputs."""

    names: tuple[str, ...]
    """Folder of each class; for ImageNet its synset id."""
    among: tuple[int, ...] | None = None
    """Classes that a picture can be of, where these are not all: the others are out before the best is chosen."""
    texts: tuple[str, ...] | None = None
    """What the classes are called in a prompt; None: open_clip's names of ImageNet's classes."""

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Name -> index."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def possible(self) -> tuple[int, ...]:
        """Classes to choose among."""
        return tuple(range(len(self.names))) if self.among is None else self.among

    @property
    def digest(self) -> str:
        """Return 16 digits that change with any name, its place or what is possible."""
        described = json.dumps([self.names, self.among, self.texts])
        return hashlib.sha256(described.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ClassSample(Sample):
    """A picture to be classified."""

    classes: ClassList = field(default=ClassList(()), repr=False)
    templates: str = ""
    """Of zero-shot classification: what the class names are put into."""


def imagenet_classes(subset: str = "") -> ClassList:
    """Return ImageNet's 1000 classes, of which pictures of a subset ("a", "r") can be of 200 only."""
    among = None
    if subset:
        among = tuple(int(line) for line in _shipped(f"imagenet_{subset}_indices.txt").read_text().split())
    return ClassList(tuple(_shipped("imagenet_synsets.txt").read_text().split()), among)


def real_labels(root: Path) -> tuple[list[Any], str]:
    """Return ReaL's label sets of the validation pictures, by their number, and where they are from.

    Raises:
        AnnotationError: the file is no list of 50,000 label sets.
    """
    own = root / "real.json"
    labels = read_json(own if own.is_file() else _shipped("imagenet_real_labels.json"), list)
    if len(labels) != 50_000:
        raise AnnotationError(f"{own} holds {len(labels)} label sets; expected 50000")
    return labels, hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]


def read_classes(file: str, root: Path) -> ClassList:
    """Return the classes of a text file: on each line a folder's name and, behind a tab, what to call it in a prompt.

    Args:
        file: its path, below the data folder or not. Without a name, a folder's underscores become spaces.
        root: the data folder.

    Raises:
        UsageError: no such file.
        AnnotationError: fewer than two classes, a class twice, an empty name.
    """
    path = next((p for p in (root / file, Path(file)) if p.is_file()), None)
    if path is None:
        raise UsageError(f"classes={file}: no such file, neither below {root} nor here")
    names, texts = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, tab, text = line.partition("\t")
        if not name.strip() or (tab and not text.strip()):
            raise AnnotationError(f"{path}, line {number}: expected a folder's name, or folder, tab, name in prompts")
        names.append(name.strip())
        texts.append(text.strip() if tab else name.strip().replace("_", " "))
    if len(set(names)) != len(names):
        raise AnnotationError(f"{path} names a class twice: {next(n for n in names if names.count(n) > 1)!r}")
    if len(names) < 2:
        raise AnnotationError(f"{path} names {len(names)} classes; expected at least 2")
    return ClassList(tuple(names), texts=tuple(texts))


def _shipped(name: str) -> Path:
    found = find_spec("timm")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "data" / "_info" / name
        if path.is_file():
            return path
    raise UsageError(f"the installed timm does not come with {name}; vislm needs timm >= 1.0.20")
