"""COCO captions: one sentence for a picture, compared with five people's. Karpathy's splits and Flickr30k likewise.

Source: Chen et al., "Microsoft COCO Captions: Data Collection and Evaluation Server", arXiv 1504.00325; Karpathy and
Fei-Fei, CVPR 2015, arXiv 1412.2306 (the splits). ``caption_metrics`` holds the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.captions.caption_extras import EXTRAS, extra_score, unavailable
from vislm.eval.captions.caption_metrics import Cider, bleu, caption_scores, rouge_l
from vislm.eval.captions.caption_tokens import TOKENIZERS, tokenise
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.reading import (
    Fault,
    Once,
    build_rows,
    find_file,
    find_folder,
    id_of,
    read_json,
    rows_of,
    safe_path,
    text_of,
)

PROMPT = "Provide a one-sentence caption for the provided image."
"""lmms-eval's."""
KARPATHY = "karpathy-"


@dataclass(frozen=True)
class Captioned:
    """One picture with people's captions."""

    id: str
    image: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CocoCaptions(Benchmark):
    """COCO captions. The score of one caption is its ROUGE-L; the figures of a run are the official ones."""

    pictures: Sequence[Captioned]
    settings: Mapping[str, Any]
    prompt: str = PROMPT
    tokenizer: str = "regex"
    extras: tuple[str, ...] = ()
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    max_new_tokens: int = 64
    name = "coco_captions"
    figures = (
        Figure("CIDEr", "mean", ("CIDEr",)),
        Figure("ROUGE_L"),
        Figure("Bleu_4", "mean", ("Bleu_4",)),
        Figure("words", "mean", ("words",), better="neither"),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per picture."""
        return [Sample(p.id, (p.image,), self.prompt, truth=list(p.captions)) for p in self.pictures]

    @cached_property
    def _references(self) -> dict[str, list[list[str]]]:
        """Picture -> its captions' words by the regex tokenizer."""
        return {p.id: tokenise(p.captions) for p in self.pictures}

    @cached_property
    def _cider(self) -> Cider:
        return Cider(list(self._references.values()))

    @property
    def protocol(self) -> dict[str, Any]:
        """Pictures, prompt, length limit, tokenizer, extra metrics."""
        return {
            **self.settings,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "tokenizer": self.tokenizer,
            "extras": list(self.extras),
            "n_images": len(self.pictures),
        }

    def parse(self, row: Row) -> Verdict:
        """Return the caption with its own ROUGE-L, CIDEr (rarity from all pictures of the benchmark) and BLEU-4.

        Words are split by the regex tokenizer whatever the benchmark's is: Java would start anew for every caption.
        """
        truth = self._references[row["id"]]
        (words,) = tokenise([row["text"]])
        values = {
            "CIDEr": self._cider.score(words, truth),
            "Bleu_4": bleu([words], [truth])[0][3],
            "words": len(words),
        }
        return Verdict(" ".join(words), rouge_l(words, truth), values)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return BLEU-1 to 4, ROUGE-L, CIDEr and the extras over the captions that are there.

        CIDEr's rarities are those of the scored pictures, as in the official scorer; it is 0 for a single one.
        """
        scored = [(p, rows[p.id]["text"]) for p in self.pictures if p.id in rows]
        hypotheses = tokenise([text for _, text in scored], self.tokenizer)
        flat = iter(tokenise([c for p, _ in scored for c in p.captions], self.tokenizer))
        references = [[next(flat) for _ in p.captions] for p, _ in scored]
        metrics: dict[str, Any] = dict(caption_scores(hypotheses, references))
        skipped = {}
        for name in self.extras if scored else ():
            skipped[name] = unavailable(name)
            if skipped[name] is None:
                del skipped[name]
                joined = [[" ".join(words) for words in texts] for texts in references]
                metrics[name] = extra_score(name, [" ".join(words) for words in hypotheses], joined)
        metrics |= {"words": sum(map(len, hypotheses)) / max(1, len(scored)), "n": len(scored)}
        warnings = [f"{name} was skipped: {reason}" for name, reason in skipped.items()]
        warnings += [] if scored else ["no captions"]
        return {**metrics, "warnings": warnings} if warnings else metrics


def load(
    path: Path,
    *,
    split: str = "auto",
    prompt: str = PROMPT,
    tokenizer: str = "regex",
    meteor: bool = False,
    spice: bool = False,
    control: Control = "none",
) -> CocoCaptions:
    """Read captions in COCO's or in Karpathy's format.

    Args:
        path: a folder with annotations/captions_val2014.json and val2014/ (COCO's own layout), with captions.json and
            images/, or with dataset_coco.json or dataset_flickr30k.json (Karpathy) and the pictures below.
        split: val2014, val2017, ...; karpathy-test, karpathy-val; "auto" takes the only captions file that is there.
        prompt: what to ask.
        tokenizer: regex, or ptb (Java; see ``vislm.eval.captions.caption_tokens``).
        meteor: compute METEOR, too, if pycocoevalcap and Java are installed.
        spice: compute SPICE, too, if its models are there as well.
        control: grey pictures or not.

    Raises:
        AnnotationError: files that are missing, no JSON or ambiguous; bad entries become ``faults`` instead.
    """
    if tokenizer not in TOKENIZERS:
        raise UnknownName("caption tokenizer", tokenizer, TOKENIZERS)
    faults: list[str] = []
    if split.startswith(KARPATHY):
        file, pictures = _karpathy(path, split.removeprefix(KARPATHY), faults)
    else:
        file, pictures = _coco(path, split, faults)
    extras = tuple(name for name, wanted in zip(EXTRAS, (meteor, spice), strict=True) if wanted)
    settings = {"split": split, "file": file.name}
    return CocoCaptions(pictures, settings, prompt, tokenizer, extras, control, faults)


def _coco(path: Path, split: str, faults: list[str]) -> tuple[Path, list[Captioned]]:
    names = ["captions.json"] if split == "auto" else [f"annotations/captions_{split}.json", f"captions_{split}.json"]
    official = sorted((path / "annotations").glob("captions_*.json"))
    if split == "auto" and official:
        if len(official) > 1:
            found = ", ".join(f.name for f in official)
            raise AnnotationError(
                f"{path} holds several captions files ({found}); choose one by its split, e.g. val2014"
            )
        names = [f"annotations/{official[0].name}"]
    file = find_file(path, names, "captions")
    images = find_folder(path, [file.name.removeprefix("captions_").partition(".")[0], "images"])
    data, once, first = read_json(file, dict), Once("image id"), Once("file_name")

    def picture(row: dict[str, Any]) -> tuple[str, Path]:
        return once(id_of(row, "id")), safe_path(images, first(text_of(row, "file_name")))

    def caption(row: dict[str, Any]) -> tuple[str, str]:
        image = id_of(row, "image_id")
        if image not in once.seen:
            raise Fault(f"is about the unknown image {image}")
        return image, text_of(row, "caption")

    pictures = dict(build_rows(file, rows_of(file, data, "images"), picture, faults, id_key="id"))
    texts: dict[str, list[str]] = {}
    for image, text in build_rows(file, rows_of(file, data, "annotations"), caption, faults, id_key="id"):
        texts.setdefault(image, []).append(text)
    faults += [f"{file.name}: image {image} has no caption" for image in pictures if image not in texts]
    return file, [Captioned(i, picture, tuple(texts[i])) for i, picture in pictures.items() if i in texts]


def _karpathy(path: Path, split: str, faults: list[str]) -> tuple[Path, list[Captioned]]:
    file = find_file(path, ["dataset_coco.json", "dataset_flickr30k.json", "dataset.json"], "Karpathy's captions")
    once = Once("imgid")

    def picture(row: dict[str, Any]) -> Captioned:
        key = once(id_of(row, "cocoid" if "cocoid" in row else "imgid"))
        folder = text_of(row, "filepath") if "filepath" in row else "images"
        image = next((f for f in _places(path, folder, text_of(row, "filename")) if f.is_file()), None)
        sentences = row.get("sentences")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(s, dict) for s in sentences):
            raise Fault("has no sentences")
        captions = tuple(text_of(sentence, "raw") for sentence in sentences)
        return Captioned(key, image or safe_path(path / "images", row["filename"]), captions)

    rows = rows_of(file, read_json(file, dict), "images")
    wanted = [row for row in rows if not isinstance(row, dict) or row.get("split") == split]
    if not any(isinstance(row, dict) for row in wanted):
        raise AnnotationError(f"{file}: no image of the split {split!r}")
    return file, build_rows(file, wanted, picture, faults, id_key="imgid")


def _places(root: Path, folder: str, name: str) -> Iterator[Path]:
    yield safe_path(safe_path(root, folder), name)
    yield safe_path(root / "images", name)
