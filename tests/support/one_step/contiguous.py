"""What a step rotates itself: the rows of streams with contiguous positions, and their older keys when a turn begins.

Streams with native and with contiguous positions share a step. Each token is rotated once and left alone once: transformers
rotates native rows by their ids and contiguous ones by 0, this plan rotates contiguous rows by their ids and native ones by 0.

Invariants:
* the pool's keys are always those that attention reads;
* a contiguous stream's key is also kept un-rotated, and is rotated anew from that: no rounding adds up;
* the distance of a query to a RETAINED key never changes, so only keys in other regions are rotated anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from streams.backbone.attention import AttentionPlan
from streams.backbone.backbone import Backbone
from streams.positions.rotary import Rotary, Tables, rotated
from tests.support.one_step.kv_pool import KVPool


@dataclass
class StepRotation:
    """What is rotated in one step, collected segment by segment as the packed row grows."""

    _own: list[np.ndarray] = field(default_factory=list)
    _slots: list[np.ndarray] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)
    _contiguous: bool = False

    def segment(self, positions: np.ndarray, *, contiguous: bool) -> np.ndarray:
        """Append the native positions int [3, n] of the row's next tokens; return those that transformers rotates by."""
        rest = np.zeros_like(positions)
        self._contiguous |= contiguous
        # Both halves of every row, native ones too: the tables of the plan are for the packed row as a whole.
        self._own.append(positions if contiguous else rest)
        return rest if contiguous else positions

    def move(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Give the keys in these slots new positions int [n], equal on the three axes, as a turn begins."""
        self._slots.append(slots)
        self._positions.append(positions)

    def plan(self, inner: AttentionPlan, pool: KVPool, new_slots: np.ndarray, backbone: Backbone) -> AttentionPlan:
        """Return `inner`, which attends over the pool, with the step's own rotations before it."""
        if not self._contiguous:
            return inner
        device, dtype = pool.kv.device, pool.kv.dtype
        self._move_keys(pool, backbone.rotary)
        own = torch.from_numpy(np.concatenate(self._own, axis=1)).to(device)
        return _RotatingPlan(inner, pool, torch.from_numpy(new_slots).to(device), backbone.rotary.tables(own, dtype))

    def _move_keys(self, pool: KVPool, rotary: Rotary) -> None:
        """Rotate the moved keys to their new positions, from the un-rotated ones, in every layer."""
        if not sum(len(slots) for slots in self._slots):
            return
        device, raw = pool.kv.device, pool.keep_raw()
        slots = torch.from_numpy(np.concatenate(self._slots)).to(device)
        positions = torch.from_numpy(np.concatenate(self._positions)).to(device)
        cos, sin = rotary.tables(positions.expand(3, -1), pool.kv.dtype)
        for layer in range(len(raw)):
            pool.kv[layer, slots, 0] = rotated(raw[layer, slots], (cos[:, None], sin[:, None]))


class _RotatingPlan:
    """Rotates the packed row's queries and keys, then attends as `inner` does. tables: cos and sin [N, D] of the row."""

    def __init__(self, inner: AttentionPlan, pool: KVPool, new_slots: torch.Tensor, tables: Tables) -> None:
        self._inner, self._raw, self._new_slots, self._tables = inner, pool.keep_raw(), new_slots, tables

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [1, H, N, D], k and v [1, H_kv, N, D] of the packed row -> [1, N, H, D]."""
        # As the model made them, before any rotation: a later turn rotates them from here.
        self._raw[layer].index_copy_(0, self._new_slots, k[0].transpose(0, 1))
        return self._inner.attend(layer, rotated(q, self._tables), rotated(k, self._tables), v, scaling)
