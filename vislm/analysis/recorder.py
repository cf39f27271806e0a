"""One recorder for a running LMM, at three levels: reductions, the last row of every step, full maps.

It is an intervention that changes nothing: ``with lmm.using(Recorder()): lmm.ask(...)``, then
``recorded(lmm.last_run)``. Reductions come from the kernels' statistics; no ``[Q, K]`` tensor is kept below "maps".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.call_rows import CallRows
from vislm.analysis.entropy import head_entropy, value_norm_ratio
from vislm.analysis.groups import GROUPS, named_groups
from vislm.analysis.records import PrefillRecord, Recording, StepRecord
from vislm.analysis.rows import row_pieces
from vislm.analysis.visual import carve_entropy, shares, sink_share, visual_entropy
from vislm.errors import UsageError
from vislm.heads.var import sink_tokens
from vislm.heads.vhr import divergence, text_norm
from vislm.kernels import StatisticsRequest
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.decoder.known_keys import follow
from vislm.lmm.interventions import EditStage, EditView, HeadStage, HeadView, PrepareView
from vislm.lmm.run import Run

LEVELS = ("reductions", "last_rows", "maps")
QUERIES = ("bos", "system", "text_before", "image", "text_between", "text_after", "last")
"""Groups of queries; the last prompt token is one of its own."""
_KEY = "recording"


@dataclass(frozen=True)
class Recorder:
    """Keep what an analysis needs of every decoder layer."""

    level: Literal["reductions", "last_rows", "maps"] = "reductions"
    """What is kept: reductions alone; the last row of every step too; the prefill's full maps too."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: all."""
    columns: bool = False
    """Also entropies of columns, which take one more pass over all rows."""
    divergence: bool = False
    """Also VHD: runs the prompt without its image beside the real one."""
    sink_dims: tuple[int, ...] = ()
    """Dimensions whose normalised activation above ``tau`` makes a token a sink; none: sinks are not looked for."""
    tau: float = 20.0
    keep_calls: bool = False
    """Hold the prefill's queries and keys, O(N) per layer, for the rollout."""
    system: int = 0
    """Tokens behind the first that are a system prompt."""
    limit: int = 2**30
    """Bytes that full maps may take."""
    name = "recorder"

    def plan(self, adapter: Adapter) -> Sequence[EditStage | HeadStage]:
        """Return a stage that looks at rows and one that looks at head outputs; both leave them alone."""
        if self.level not in LEVELS:
            raise UsageError(f"level={self.level!r}: expected one of {', '.join(LEVELS)}")
        layers = frozenset(range(len(adapter.layers)) if self.layers is None else self.layers)
        width = adapter.text_config.hidden_size
        if any(not 0 <= dim < width for dim in self.sink_dims):
            raise UsageError(f"sink_dims={self.sink_dims}: hidden states have dimensions 0..{width - 1}")
        if not layers:
            return []
        return [
            EditStage(
                layers,
                self._row,
                prepare=functools.partial(self._prefill, len(layers)),
                needs_hidden=bool(self.sink_dims),
                every_sample=True,
                observes=True,
            ),
            HeadStage(layers, self._heads, "any" if self.divergence else "no"),
        ]

    # -- what the stages call ----------------------------------------------------------------------------------------
    def _prefill(self, depth: int, view: PrepareView) -> None:
        call, keys = view.call, view.keys
        recording = view.memory.setdefault(_KEY, Recording(GROUPS, QUERIES))
        queries = call.query.shape[2]
        valid = keys.valid[:, :queries]
        groups = {name: mask[:, : call.key.shape[2]] for name, mask in named_groups(keys, self.system).items()}
        found = call.statistics(StatisticsRequest(received=valid, entropy=True, mass=groups))
        assert found.received is not None
        assert found.entropy is not None
        assert found.mass is not None
        heads = call.query.shape[1]
        recording.prefill[view.layer] = PrefillRecord(
            valid=valid,
            image_of=keys.image_of[:, :queries],
            token_of=keys.token_of[:, :queries],
            received=found.received[..., :queries],
            row_entropy=found.entropy,
            flow=_flow(found.mass, query_groups(keys, queries, self.system)),
            value_ratio=value_norm_ratio(call.value[:, :, :queries], valid, heads),
            entropy=head_entropy(CallRows(call), valid) if self.columns else None,
            sinks=self._sinks(view, valid),
            map=self._map(view, depth) if self.level == "maps" else None,
            call=call if self.keep_calls else None,
        )

    def _row(self, view: EditView) -> None:
        recording: Recording = view.memory.setdefault(_KEY, Recording(GROUPS, QUERIES))
        if not recording.steps or view.layer in recording.steps[-1]:
            recording.steps.append({})
        keys, row = view.keys, view.softmax()
        image, top = keys.image, row[:, :, 0].argmax(-1)
        batch = len(row)
        sinks = recording.prefill[view.layer].sinks
        recording.steps[-1][view.layer] = StepRecord(
            mass=torch.stack(list(shares(row, self._groups(view)).values()), -1)[:, :, 0],
            visual_entropy=visual_entropy(row, image)[..., 0],
            carve_entropy=carve_entropy(row, image)[:, 0],
            top_key=top,
            top_token=keys.token_of[:, None].expand(-1, row.shape[1], -1).gather(-1, top[..., None])[..., 0],
            sink_share=None if sinks is None else sink_share(row, image, follow(sinks, batch, row.shape[-1]))[..., 0],
            row=row[:, :, 0].cpu() if self.level != "reductions" else None,
            image_row=_on_first_image(row[:, :, 0], keys).cpu() if self.level != "reductions" else None,
        )

    def _heads(self, view: HeadView) -> None:
        recording: Recording | None = view.memory.get(_KEY)
        if recording is None:  # a draft that another method writes first
            return
        recording.steps[-1][view.layer].head_norm = view.image_output.float().norm(dim=-1)
        if view.text_only_output is not None:
            recording.divergence[view.layer] = divergence(view.image_output, view.text_only_output)
            recording.text_activity[view.layer] = text_norm(view.text_only_output)

    # -- parts -------------------------------------------------------------------------------------------------------
    def _groups(self, view: EditView) -> dict[str, Tensor]:
        """Return the groups of this step's keys; layers with the same keys share them."""
        known = view.memory.get("groups")
        if known is None or known[0] is not view.keys:
            known = view.memory["groups"] = (view.keys, named_groups(view.keys, self.system))
        return known[1]

    def _sinks(self, view: PrepareView, valid: Tensor) -> Tensor | None:
        if not self.sink_dims or view.hidden is None:
            return None
        return sink_tokens(view.hidden, self.sink_dims, self.tau) & valid

    def _map(self, view: PrepareView, depth: int) -> Tensor:
        source = CallRows(view.call)
        wanted = map_bytes(source.shape, depth)
        check_maps(wanted, self.limit, f"{depth} layers and {source.shape[2]} tokens")
        return torch.cat([rows.cpu() for _, rows in row_pieces(source)], 2)


def recorded(run: Run | None) -> Recording:
    """Return what a :class:`Recorder` kept of a run.

    Raises:
        UsageError: a run without a recorder.
    """
    for memory in run.memory.values() if run is not None else ():
        if _KEY in memory:
            return memory[_KEY]
    raise UsageError("this run had no recorder; run it inside `with lmm.using(Recorder()):`")


def map_bytes(shape: Sequence[int], layers: int) -> int:
    """Return the bytes of float32 maps (B, H, Q, K) of so many layers."""
    batch, heads, queries, keys = shape
    return 4 * layers * batch * heads * queries * keys


def check_maps(wanted: int, limit: int, what: str) -> None:
    """Raise ``UsageError`` when full maps take more than ``limit`` bytes; ``what`` says which."""
    if wanted > limit:
        raise UsageError(
            f"full maps of {what} take {wanted / 2**20:,.0f} MiB; the limit is {limit / 2**20:,.0f} MiB. Record "
            "level='last_rows' or fewer layers=, show a smaller picture, or raise limit="
        )


def query_groups(keys: KeyGroups, queries: int, system: int = 0) -> dict[str, Tensor]:
    """Return name -> (B, Q) bool of :data:`QUERIES`: the groups of a prompt's queries."""
    groups = named_groups(keys, system)
    last = torch.arange(queries, device=keys.valid.device) == keys.prompt - 1
    split = {name: groups[name][:, :queries] & ~last for name in QUERIES[:-1]}
    return {**split, "last": keys.valid[:, :queries] & last}


def _flow(mass: dict[str, Tensor], queries: dict[str, Tensor]) -> Tensor:
    """Return (B, H, Gq, Gk): means of mass (B, H, Q) over groups of queries (B, Q); NaN for empty groups."""
    by_key = torch.stack([mass[name] for name in GROUPS], -1)
    by_query = torch.stack(list(queries.values()), 1).to(by_key.dtype)
    total = by_query[:, None] @ by_key
    return total / by_query.sum(-1)[:, None, :, None].where(by_query.any(-1)[:, None, :, None], torch.nan)


def _on_first_image(row: Tensor, keys: KeyGroups) -> Tensor:
    """Return (B, H, m): rows (B, H, K) on the tokens of each sample's first image, 0 where a token is gone.

    m covers the last token that is left in this layer.
    """
    numbers = torch.where(keys.image, keys.image_of, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
    mine = keys.image & (keys.image_of == numbers)
    length = int(keys.token_of.max()) + 1
    place = torch.where(mine, keys.token_of, length)
    result = row.new_zeros(*row.shape[:2], length + 1)
    return result.scatter(2, place[:, None].expand_as(row), row)[..., :length]
