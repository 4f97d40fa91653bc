"""The model's forward over one packed row of tokens, and how their keys and values meet the pool.

A row is forwarded in passes that follow one another within each layer. Turns that end are the first pass and still see
everything; then keys are moved to their new slots and positions; turns that begin are the second pass.

Invariants:
* keys and values of the row are in the pool when it returns, each layer's before that layer attends;
* every pass sees what the passes before it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.attention import Attend, AttentionBackend
from rollout.engine.kv_pool import KVPool
from rollout.engine.step_plan import Part, StepPlan
from streams.backbone.backbone import Backbone, VideoTokens
from streams.positions.rotary import Tables, rotated


@dataclass(frozen=True)
class Pass:
    """Rows [start, stop) of the packed row.

    Attributes:
        slots: int64 [n], where their keys and values go.
        attend: who they see.
        before: called with the layer before anything of it is written; they do what keys need to be where this pass looks.
    """

    start: int
    stop: int
    slots: torch.Tensor
    attend: Attend
    before: Sequence[Callable[[int], None]] = ()


class PoolAttention:
    """The attention plan of one forward. tables: cos and sin [N, D] of the row, None if the model rotates all of it."""

    def __init__(self, pool: KVPool, passes: Sequence[Pass], tables: Tables | None = None) -> None:
        self._pool, self._passes, self._tables = pool, passes, tables
        self._raw = None if tables is None else pool.keep_raw()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [1, H, N, D], k and v [1, H_kv, N, D] of the packed row -> [1, N, H, D]."""
        unrotated = k[0]
        if self._tables is not None:
            q, k = rotated(q, self._tables), rotated(k, self._tables)
        outs = []
        for part in self._passes:
            rows = slice(part.start, part.stop)
            for step in part.before:
                step(layer)
            if self._raw is not None:
                # As the model made them, before any rotation: a later turn rotates them from here.
                self._raw[layer].index_copy_(0, part.slots, unrotated[:, rows].transpose(0, 1))
            self._pool.write(layer, part.slots, k[0, :, rows], v[0, :, rows])
            outs.append(part.attend(layer, q[0, :, rows], scaling))
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


def forward(step: StepPlan, backbone: Backbone, backend: AttentionBackend, pool: KVPool) -> torch.Tensor:
    """Return the row's hidden states [rows, hidden], in the backbone's dtype and on its device."""
    device = backbone.device
    parts = [part for part in (step.ends, step.turns) if part.rows]
    ids = np.concatenate([ids for part in parts for ids in part.ids]).astype(np.int64)
    passes, at = [], 0
    for part in parts:
        before = _movements(step, backbone, pool) if part is step.turns else []
        slots = torch.from_numpy(np.concatenate(part.slots)).to(device)
        passes.append(Pass(at, at + part.rows, slots, backend.segments(part.segments), before))
        at += part.rows
    by_model, by_engine = _positions(parts)
    tables = None
    if by_engine is not None:
        tables = backbone.rotary.tables(torch.from_numpy(by_engine).to(device), pool.kv.dtype)
    video = None
    if step.features:
        index = torch.from_numpy(np.concatenate(step.video) + step.ends.rows).to(device)
        video = VideoTokens(index, torch.cat(step.features))
    return backbone.hidden(
        torch.from_numpy(ids).to(device)[None],
        torch.from_numpy(by_model).to(device)[:, None],
        PoolAttention(pool, passes, tables),
        video,
    )[0]


def decode_forward(
    ids: torch.Tensor,
    positions: torch.Tensor,
    contiguous: torch.Tensor | None,
    slots: torch.Tensor,
    attend: Attend,
    backbone: Backbone,
    pool: KVPool,
) -> torch.Tensor:
    """Return the hidden states [n, hidden] of one token per stream; nothing here is read back to the host.

    Args:
        ids, positions, slots: int64 [n].
        contiguous: bool [n], rows whose position the engine rotates by; None: there are none.
        attend: who each row sees.
    """
    tables = None
    by_model = positions
    if contiguous is not None:
        by_model = positions.masked_fill(contiguous, 0)
        tables = backbone.rotary.tables(positions.masked_fill(~contiguous, 0).expand(3, -1), pool.kv.dtype)
    plan = PoolAttention(pool, [Pass(0, len(ids), slots, attend)], tables)
    return backbone.hidden(ids[None], by_model.expand(3, 1, -1), plan)[0]


def _movements(step: StepPlan, backbone: Backbone, pool: KVPool) -> list[Callable[[int], None]]:
    """What must happen to kept keys between the turns that end and those that begin: first to their slots."""
    found: list[Callable[[int], None]] = []
    if step.moved_from:
        device = pool.kv.device
        source, target = (torch.from_numpy(np.concatenate(s)).to(device) for s in (step.moved_from, step.moved_to))
        found.append(lambda layer: pool.move(layer, source, target))
    if step.contiguous and (turning := step.moved_keys.prepare(pool, backbone.rotary)) is not None:
        found.append(turning)
    return found


def _positions(parts: list[Part]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the position ids int64 [3, n] that the model rotates by, and those that the engine does; None if none."""
    native = np.concatenate([ids for part in parts for ids in part.positions], axis=1).astype(np.int64)
    if not any(any(part.contiguous) for part in parts):
        return native, None
    own = np.concatenate(
        [np.full(ids.shape[1], c) for part in parts for ids, c in zip(part.positions, part.contiguous, strict=True)]
    )
    return np.where(own, 0, native), np.where(own, native, 0)
