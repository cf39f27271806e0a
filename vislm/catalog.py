"""What the package offers, in words: the source of ``vislm list`` and ``vislm info``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path

from vislm import registry

Entries = Iterator[tuple[str, str]]


def _models() -> Entries:
    from vislm.lmm.loading import EMBEDDED

    for name in EMBEDDED:
        yield name, "embedded; LLaVA architecture, trained on generated scenes"
    yield "PATH | HUB", "any transformers model of a supported family (vislm list families)"


def _families() -> Entries:
    from vislm.lmm.adapters import FAMILIES

    for name, place in FAMILIES.items():
        yield name, (import_module(place.split(":")[0]).__doc__ or "").strip().splitlines()[0]


def _methods(kind: str) -> Callable[[], Entries]:
    def entries() -> Entries:
        for name in registry.names(kind):
            yield name, registry.summary(kind, name)

    return entries


def _benchmarks() -> Entries:
    from vislm.eval.specs import benchmark_names

    yield from benchmark_names().items()


def _backends() -> Entries:
    from vislm.kernels import BACKENDS

    for name, backend in BACKENDS.items():
        yield name, (backend.__doc__ or "").strip().splitlines()[0]


def _backbones() -> Entries:
    from vislm.backbones import list_models, variant

    for name in list_models():
        published = variant(name).published
        gmacs = "" if published.gmacs is None else f", {published.gmacs:g} GMACs"
        top1 = "" if published.top1 is None else f", top-1 {published.top1:.1f} %"
        yield name, f"{published.params / 1e6:5.1f} M parameters{gmacs}{top1} at {published.input_size}"


def _attentions() -> Entries:
    from vislm.attention import attention_class, attention_names

    for name in attention_names():
        yield name, (import_module(attention_class(name).__module__).__doc__ or "").strip().splitlines()[0]


SECTIONS: dict[str, Callable[[], Entries]] = {
    "models": _models,
    "families": _families,
    "backbones": _backbones,
    "attentions": _attentions,
    "pruning": _methods("pruning"),
    "heads": _methods("heads"),
    "benchmarks": _benchmarks,
    "backends": _backends,
}
"""Kind -> its entries (name, one line)."""


def describe(name: str, size: tuple[int, int] | None = None, device: str = "cpu") -> Iterator[str]:
    """Yield lines about a method (its options) or a model (its sizes and what an image costs).

    Args:
        name: of a method, backbone or model.
        size: height and width of the image that a backbone is measured with; None = that of its published figures.
        device: where a backbone is measured.
    """
    from vislm.backbones import list_models

    if name in list_models():
        yield from _describe_backbone(name, size, device)
        return
    for kind in registry.AREAS:
        if name in registry.names(kind):
            yield f"{name}: {registry.summary(kind, name)}"
            yield f"  use: --{'prune' if kind == 'pruning' else 'heads'} {name}:OPTION=VALUE,..."
            for option, (hint, default) in registry.options(kind, name).items():
                yield f"  {option} = {default!r}  ({hint})"
            return
    yield from _describe_model(name)


def _describe_backbone(name: str, size: tuple[int, int] | None, device: str) -> Iterator[str]:
    import torch

    from vislm.backbones import create_model, variant
    from vislm.backbones.facts import measure, receptive_fields

    published, model = variant(name).published, create_model(name)
    height, width = size or (published.input_size, published.input_size)
    levels = [(info["num_chs"], info["reduction"]) for info in model.feature_info]
    gmacs = "" if published.gmacs is None else f", {published.gmacs:g} G multiply-adds"
    top1 = "no accuracy" if published.top1 is None else f"top-1 {published.top1:.1f} % on ImageNet-1k"
    yield f"{name}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    yield f"  published: {top1}{gmacs} at {published.input_size} x {published.input_size} ({published.source})"
    yield f"  features: {_joined(f'{info[0]} wide at 1/{info[1]}' for info in levels)}"
    yield f"  at {height} x {width}: {model.macs((height, width)) / 1e9:.3f} G multiply-adds"
    cost = measure(model.to(device), (height, width))
    memory = "unknown memory" if cost.memory is None else f"{cost.memory / 2**20:.1f} MiB beside weights and image"
    where = f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else device
    yield f"  measured: {cost.milliseconds:.1f} ms, {memory} (1 image, float32, {where})"
    fields = (f"{rows} x {columns}" for rows, columns in receptive_fields(model, (height, width)))
    yield f"  pixels that a token in the middle sees: {_joined(fields)}"


def _joined(texts: Iterable[str]) -> str:
    counted = ((text, len(list(group))) for text, group in itertools.groupby(texts))
    return ", ".join(f"{count} times {text}" if count > 1 else text for text, count in counted)


def _describe_model(name: str) -> Iterator[str]:
    from vislm.backbones import list_models
    from vislm.errors import UnknownName
    from vislm.lmm.cost.flops import DecoderShape
    from vislm.lmm.loading import EMBEDDED
    from vislm.lmm.model import load_lmm

    if "/" not in name and not Path(name).exists() and name not in EMBEDDED:
        methods = (method for kind in registry.AREAS for method in registry.names(kind))
        raise UnknownName("name", name, [*EMBEDDED, *methods, *list_models()])

    lmm = load_lmm(name)
    adapter = lmm.adapter
    decoder, tower = DecoderShape.of(adapter.text_config), adapter.tower_shape
    size = sum(p.numel() for p in lmm.model.parameters())
    grid = "any size" if adapter.patch_grid is None else "{} x {}".format(*adapter.patch_grid)
    yield f"{name}: {adapter.family}, {size:,} parameters"
    yield f"  vision tower: {tower.layers} layers x {tower.width}, patch grid {grid}"
    yield f"  language model: {decoder.layers} layers x {decoder.width}, {decoder.heads} heads of {decoder.head_dim}"
    if tower.patches is not None:
        tokens = [tower.patches // tower.cell] * decoder.layers
        yield f"  tower: {tower.flops(None) / 1e9:.3f} GFLOPs a crop"
        yield f"  prefill of a crop's tokens: {decoder.prefill_flops(tokens) / 1e9:.3f} GFLOPs"
        yield f"  key-value cache of a crop's tokens: {decoder.kv_bytes(tokens, 2):,} bytes in 16 bit"
    for key, value in lmm.fingerprint().items():
        yield f"  {key}: {value}"
