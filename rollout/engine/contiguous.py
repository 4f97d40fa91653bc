"""What a forward rotates itself: the rows of streams with contiguous positions, and their older keys when a turn begins.

Streams with native and with contiguous positions share a forward. Each token is rotated once and left alone once:
transformers rotates native rows by their ids and contiguous ones by 0, the engine rotates contiguous rows by their ids and
native ones by 0.

Invariants:
* the pool's keys are always those that attention reads;
* a contiguous stream's key is also kept un-rotated, and is rotated anew from that: no rounding adds up;
* the distance of a query to a RETAINED key never changes, so only keys in other regions are rotated anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.engine.kv_pool import KVPool
from streams.positions.rotary import Rotary, rotated


@dataclass
class MovedKeys:
    """The keys that get new positions as turns begin, collected stream by stream."""

    _slots: list[np.ndarray] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)

    def move(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Give the keys in these slots new positions int [n], equal on the three axes."""
        self._slots.append(slots)
        self._positions.append(positions)

    def prepare(self, pool: KVPool, rotary: Rotary) -> Turning | None:
        """Return what rotates them; None if there are none."""
        if not sum(len(slots) for slots in self._slots):
            return None
        device = pool.kv.device
        slots = torch.from_numpy(np.concatenate(self._slots)).to(device)
        positions = torch.from_numpy(np.concatenate(self._positions)).to(device)
        cos, sin = rotary.tables(positions.expand(3, -1), pool.kv.dtype)
        return Turning(pool, slots, cos[:, None], sin[:, None])


@dataclass(frozen=True)
class Turning:
    """Keys in `slots` int64 [n], and the tables [n, 1, D] to rotate them by."""

    pool: KVPool
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, layer: int) -> None:
        """Rotate them to their new positions in one layer, from the un-rotated ones."""
        raw = self.pool.keep_raw()[layer, self.slots]
        self.pool.keys(layer)[self.slots] = rotated(raw, (self.cos, self.sin))
