"""Which pictures CHAIR asks about, and what they show: from COCO annotations or from the compact object table."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.captions.chair_scores import ground_truth, read_object_table
from vislm.eval.captions.vocabulary import Vocabulary, coco_vocabulary, vocabulary_of
from vislm.eval.coco import has_coco_folder, read_coco_folder
from vislm.eval.reading import find_file, find_folder, read_text, shown

SOURCES = ("auto", "annotations", "table")
_TABLES = "chair_ground_truth*.json*"
_NUMBER = re.compile(r"(\d{1,18})\.\w+")
_ID_KEYS = ("image_id", "id")


@dataclass(frozen=True)
class Source:
    """Pictures with the objects that they show."""

    paths: Mapping[str, Path]
    """File name -> file."""
    truth: Mapping[str, Collection[str]]
    """File name -> objects."""
    vocabulary: Vocabulary
    how: str
    """What the truth is made of."""
    is_scenes: bool = False
    uncaptioned: Collection[str] = ()
    """Pictures whose objects come from instances alone."""


def find_pictures(
    root: Path, *, source: str, ids: str, coco: str, draw: int | None, seed: int, faults: list[str]
) -> Source:
    """Read the pictures of a folder; the arguments are those of :func:`vislm.eval.captions.chair.load`."""
    if source not in SOURCES:
        raise UnknownName("source of CHAIR's truth", source, SOURCES)
    tables = sorted(root.glob(_TABLES))
    if source == "table" or (source == "auto" and tables and not has_coco_folder(root, coco)):
        found, names = _from_table(root, tables, coco, bool(ids), faults)
    else:
        found, names = _from_annotations(root, coco, faults)
    chosen = _listed(root, ids, names, faults) if ids else list(found.paths)
    if not chosen and not faults:
        raise AnnotationError(f"{root} holds no images")
    if draw is not None:
        if not 1 <= draw <= len(chosen):
            raise UsageError(f"draw={draw}: expected 1 to {len(chosen)}, the number of pictures")
        chosen = random.Random(seed).sample(chosen, draw)
    return Source(
        {name: found.paths[name] for name in chosen},
        {name: found.truth[name] for name in chosen},
        found.vocabulary,
        found.how,
        found.is_scenes,
        [name for name in chosen if name in found.uncaptioned],
    )


def _from_annotations(root: Path, coco: str, faults: list[str]) -> tuple[Source, dict[int, str]]:
    folder = read_coco_folder(root, coco, faults)
    known = coco_vocabulary()
    is_coco = set(folder.categories.values()) <= set(known.objects)
    vocabulary = known if is_coco else vocabulary_of(list(folder.categories.values()))
    truth = ground_truth(folder.objects, folder.captions, vocabulary)
    how = "instances and captions" if folder.captions else "instances"
    found = Source(
        {name: folder.path(i) for i, name in folder.images.items()},
        {name: truth[i] for i, name in folder.images.items()},
        vocabulary,
        how,
        folder.is_scenes,
        {name for i, name in folder.images.items() if i not in folder.captions},
    )
    return found, folder.images


def _from_table(
    root: Path, tables: list[Path], coco: str, listed: bool, faults: list[str]
) -> tuple[Source, dict[int, str]]:
    """Read the table; without a list of ids the pictures are those that lie in the folder."""
    if len(tables) != 1:
        names = ", ".join(path.name for path in tables) or "none"
        raise AnnotationError(f"{root} must hold one object table {_TABLES}; found {names}")
    vocabulary = coco_vocabulary()
    objects = read_object_table(tables[0], vocabulary, faults)
    folder = find_folder(root, [coco, "images"])
    lying = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = {int(found[1]): name for name in lying if (found := _NUMBER.search(name))}
    if listed:
        names = {i: names.get(i, f"COCO_{coco}_{i:012d}.jpg") for i in objects}
    unknown = [i for i in names if i not in objects]
    faults += [f"{folder.name}/{names.pop(i)}: image {i} is not in {tables[0].name}" for i in unknown]
    paths = {name: folder / name for name in names.values()}
    truth = {name: objects[i] for i, name in names.items()}
    return Source(paths, truth, vocabulary, f"object table {tables[0].name.partition('.')[0]}"), names


def _listed(root: Path, ids: str, names: Mapping[int, str], faults: list[str]) -> list[str]:
    """Return the names of the pictures that a file lists, by id or by file name, in its order."""
    path = find_file(root, [ids], "list of images")
    known = {**{str(i): name for i, name in names.items()}, **{name: name for name in names.values()}}
    chosen: dict[str, None] = {}
    for number, entry in enumerate(_entries(path), start=1):
        value = next((entry[k] for k in _ID_KEYS if k in entry), None) if isinstance(entry, dict) else entry
        name = known.get(str(value)) if isinstance(value, int | str) else None
        if name is None:
            faults.append(f"{path.name}: entry {number}: {shown(value)} is no known image")
        elif name in chosen:
            faults.append(f"{path.name}: entry {number}: image {shown(value)} appears twice")
        else:
            chosen[name] = None
    return list(chosen)


def _entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list, of JSON lines, or the lines of a text."""
    text = read_text(path)
    try:
        whole = json.loads(text)
        yield from whole if isinstance(whole, list) else [whole]
        return
    except (ValueError, RecursionError):
        pass
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            yield json.loads(line) if line.startswith("{") else line
        except (ValueError, RecursionError):
            yield line
