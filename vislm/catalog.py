"""What the package offers, in words: the source of ``vislm list`` and ``vislm info``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    from vislm.eval.benchmarks import BENCHMARKS

    yield from BENCHMARKS.items()


def _backends() -> Entries:
    from vislm.kernels import BACKENDS

    for name, backend in BACKENDS.items():
        yield name, (backend.__doc__ or "").strip().splitlines()[0]


SECTIONS: dict[str, Callable[[], Entries]] = {
    "models": _models,
    "families": _families,
    "pruning": _methods("pruning"),
    "heads": _methods("heads"),
    "benchmarks": _benchmarks,
    "backends": _backends,
}
"""Kind -> its entries (name, one line)."""


def describe(name: str) -> Iterator[str]:
    """Yield lines about a method (its options) or a model (its sizes and what an image costs)."""
    for kind in registry.AREAS:
        if name in registry.names(kind):
            yield f"{name}: {registry.summary(kind, name)}"
            yield f"  use: --{'prune' if kind == 'pruning' else 'heads'} {name}:OPTION=VALUE,..."
            for option, (hint, default) in registry.options(kind, name).items():
                yield f"  {option} = {default!r}  ({hint})"
            return
    yield from _describe_model(name)


def _describe_model(name: str) -> Iterator[str]:
    from vislm.errors import UnknownName
    from vislm.lmm.cost import DecoderShape, TowerShape
    from vislm.lmm.loading import EMBEDDED
    from vislm.lmm.model import load_lmm

    if "/" not in name and not Path(name).exists() and name not in EMBEDDED:
        raise UnknownName("name", name, [*EMBEDDED, *(n for kind in registry.AREAS for n in registry.names(kind))])

    lmm = load_lmm(name)
    adapter, config = lmm.adapter, lmm.model.config
    decoder, tower = DecoderShape.of(config.text_config), TowerShape.of(config, adapter.tower_prefix)
    size = sum(p.numel() for p in lmm.model.parameters())
    rows, columns = adapter.patch_grid
    tokens = [tower.patches] * decoder.layers
    yield f"{name}: {adapter.family}, {size:,} parameters"
    yield f"  vision tower: {tower.layers} layers x {tower.width}, patch grid {rows} x {columns}"
    yield f"  language model: {decoder.layers} layers x {decoder.width}, {decoder.heads} heads of {decoder.head_dim}"
    yield f"  tower: {tower.flops(None) / 1e9:.3f} GFLOPs an image"
    yield f"  prefill of an image's tokens: {decoder.prefill_flops(tokens) / 1e9:.3f} GFLOPs"
    yield f"  key-value cache of an image's tokens: {decoder.kv_bytes(tokens, 2):,} bytes in 16 bit"
    for key, value in lmm.fingerprint().items():
        yield f"  {key}: {value}"
