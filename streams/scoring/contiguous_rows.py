"""Packed rows of contiguous streams: a copy of a token's key for every move into a region, at its coordinate there.

Invariants:
* a query sees a token through exactly one key: the native one until the token's first move, then its copies, each from
  its entry to the next entry or the token's expiry;
* row coordinates are those of `packing`;
* logs with native positions have no copies and are rotated by the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from streams.log.record import StreamLog
from streams.positions.regions import STATIC


@dataclass(frozen=True)
class RegionRows:
    """R rows of L tokens with M copies each, region by region, padded with copies that are never visible.

    Attributes:
        own: int64 [3, R, L], position ids that the plan rotates a token by (0 where the model rotates it).
        offsets: int64 [5, R, L], what a query adds to them for each region.
        token: int64 [R, M], index in the row of a copy's token.
        coordinate: int64 [R, M], a copy's place in its region.
        entry, exit: int64 [R, M], the queries [entry, exit) that see a copy.
        bounds: the copies of region r are those from bounds[r] to bounds[r + 1], in every row.
    """

    own: torch.Tensor
    offsets: torch.Tensor
    token: torch.Tensor
    coordinate: torch.Tensor
    entry: torch.Tensor
    exit: torch.Tensor
    bounds: tuple[int, ...]

    @property
    def filled(self) -> tuple[int, ...]:
        """Regions that have a copy in any row."""
        return tuple(int(r) for r in STATIC if self.bounds[r + 1] > self.bounds[r])

    def to(self, device: torch.device) -> RegionRows:
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def padded(self, tokens: int, multiple: int) -> RegionRows:
        """Return the rows with `tokens` more tokens at their ends, and copies padded to a multiple of `multiple`."""
        copies = self.token.shape[1]
        more = -copies % multiple
        wide: dict[str, Any] = {n: pad(getattr(self, n), (0, more)) for n in ("token", "coordinate", "entry", "exit")}
        own, offsets = (pad(t, (0, tokens)) for t in (self.own, self.offsets))
        # Added to the last region that has copies: a region that was empty would cost another set of queries.
        bounds = tuple(bound + more if bound == copies else bound for bound in self.bounds)
        return replace(self, own=own, offsets=offsets, **wide, bounds=bounds)


def native_until(log: StreamLog) -> np.ndarray:
    """Return int32 [L]: the first index whose query no longer sees a token at its native position."""
    until = log.expiry.copy()
    if log.regions is not None:
        np.minimum.at(until, log.regions.token, log.regions.entry)
    return until


def pack_regions(logs: list[StreamLog], rows: list[list[int]], length: int) -> RegionRows | None:
    """Return the regions of logs packed by `packing.pack` into rows of `length` tokens; None if no log has regions."""
    members = [logs[i] for row in rows for i in row]
    if all(log.regions is None for log in members):
        return None
    own = np.zeros((3, len(rows), length), np.int64)
    offsets = np.zeros((len(STATIC), len(rows), length), np.int64)
    # copies[region][row]: arrays [4, n] of token, coordinate, entry, exit.
    copies: list[list[list[np.ndarray]]] = [[[] for _ in rows] for _ in STATIC]
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            log, end = logs[i], at + len(logs[i])
            if log.regions is not None:
                own[:, r, at:end] = log.positions
                offsets[:, r, at:end] = log.regions.offsets[log.turn].T
                piece, region = _copies(log, at)
                for s in STATIC:
                    copies[s][r].append(piece[:, region == s])
            at = end
    blocks, bounds = [np.zeros((4, len(rows), 0), np.int64)], [0]
    for of_region in copies:
        joined = [np.concatenate([np.zeros((4, 0), np.int64), *pieces], axis=1) for pieces in of_region]
        block = np.zeros((4, len(rows), max(piece.shape[1] for piece in joined)), np.int64)
        for r, piece in enumerate(joined):
            block[:, r, : piece.shape[1]] = piece
        blocks.append(block)
        bounds.append(bounds[-1] + block.shape[2])
    token, coordinate, entry, leaving = torch.from_numpy(np.concatenate(blocks, axis=2))
    return RegionRows(
        torch.from_numpy(own), torch.from_numpy(offsets), token, coordinate, entry, leaving, tuple(bounds)
    )


def _copies(log: StreamLog, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64 [4, n]: token, coordinate, entry, exit of every copy; its region [n]) for a log that begins at `at`."""
    moves = log.regions
    assert moves is not None
    order = np.lexsort((moves.entry, moves.token))
    token, entry = moves.token[order].astype(np.int64), moves.entry[order].astype(np.int64)
    leaves = np.minimum(log.expiry[token].astype(np.int64), len(log))
    # Sorted by token, then by entry: a copy ends where the next one of the same token begins.
    again = np.flatnonzero(token[1:] == token[:-1])
    leaves[again] = entry[again + 1]
    return np.stack([token + at, moves.coordinate[order], entry + at, leaves + at]), moves.region[order]
