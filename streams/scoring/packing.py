"""Packing: several stream logs into rows of tokens that one forward scores.

Invariants:
* every token keeps its ids, positions, expiry and lane, offset to its place in the row;
* expiry is capped at its stream's end;
* padding attends only to padding and never enters a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from streams.log.record import NEVER, Kind, StreamLog
from streams.scoring.contiguous_rows import RegionRows, native_until, pack_regions


@dataclass(frozen=True)
class Rows:
    """R rows of L tokens, with N target tokens in the order of the logs.

    Attributes:
        ids: int64 [R, L].
        positions: int64 [3, R, L]; 0 for logs with contiguous positions, whose keys the plan rotates.
        expiry: int64 [R, L], in row coordinates; for logs with contiguous positions, the end of a token's native
            position: its expiry or its first move.
        lane: int64 [R, L].
        predictor: int64 [N], flat row index of the token before each target.
        target_ids: int64 [N].
        stream: int64 [N], which of the packed logs a target belongs to.
        target_index: int64 [N], the target's index in that log.
        video_index: int64 [M], flat row index of every video token, log by log, in append order.
        regions: the copies of contiguous streams; None if no log has any.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    expiry: torch.Tensor
    lane: torch.Tensor
    predictor: torch.Tensor
    target_ids: torch.Tensor
    stream: torch.Tensor
    target_index: torch.Tensor
    video_index: torch.Tensor
    regions: RegionRows | None = None

    @property
    def num_targets(self) -> int:
        return len(self.target_ids)

    def padded(self, multiple: int, at_least: int) -> Rows:
        """Return the rows padded at their ends to a multiple of `multiple` tokens and to at least `at_least`."""
        length = self.ids.shape[1]
        wide = -(-max(length, at_least) // multiple) * multiple
        if wide == length and self.regions is None:
            return self

        def moved(index: torch.Tensor) -> torch.Tensor:
            return index // length * wide + index % length

        return replace(
            self,
            ids=pad(self.ids, (0, wide - length)),
            positions=pad(self.positions, (0, wide - length)),
            expiry=pad(self.expiry, (0, wide - length), value=wide),
            lane=pad(self.lane, (0, wide - length)),
            predictor=moved(self.predictor),
            video_index=moved(self.video_index),
            regions=None if self.regions is None else self.regions.padded(wide - length, multiple),
        )

    def to(self, device: torch.device) -> Rows:
        moved: dict[str, Any] = {n: None if v is None else v.to(device) for n, v in vars(self).items()}
        return Rows(**moved)


def plan_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return rows of stream indices, at most `capacity` tokens each; a longer stream gets its own (first fit decreasing)."""
    rows: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for at, (used, members) in enumerate(rows):
            if used + lengths[i] <= capacity:
                rows[at] = (used + lengths[i], [*members, i])
                break
        else:
            rows.append((lengths[i], [i]))
    return [members for _, members in rows]


def plan_micro_batches(lengths: list[int], capacity: int, max_tokens: int) -> list[list[list[int]]]:
    """Group rows into micro-batches of at most `max_tokens` padded tokens (at least one row each)."""
    rows = sorted(plan_rows(lengths, capacity), key=lambda row: -sum(lengths[i] for i in row))
    batches: list[list[list[int]]] = []
    for row in rows:
        width = sum(lengths[i] for i in (batches[-1][0] if batches else row))
        if batches and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pack(logs: list[StreamLog], rows: list[list[int]], *, which: str = "target") -> Rows:
    """Pack `logs[i]` for i in each row. `which` names the bool column that marks targets: 'target' or 'sampled'."""
    length = max(sum(len(logs[i]) for i in row) for row in rows)
    shape = (len(rows), length)
    ids = np.zeros(shape, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    expiry = np.full(shape, length, np.int64)
    lane = np.zeros(shape, np.int64)
    predictor, target_ids, stream, index, video = [], [], [], [], []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            log, end = logs[i], at + len(logs[i])
            span = slice(at, end)
            ids[r, span] = log.ids
            positions[:, r, span] = log.positions if log.regions is None else 0
            lane[r, span] = log.lane
            # NEVER becomes the end of the stream: it must not reach into the next one of the row.
            until = native_until(log)
            expiry[r, span] = np.where(until == NEVER, end, np.minimum(until.astype(np.int64) + at, end))
            targets = np.flatnonzero(getattr(log, which))
            assert not len(targets) or targets[0] > 0, "the first token of a log has no predictor"
            assert (log.lane[targets - 1] == log.lane[targets]).all(), "a target and its predictor share a lane"
            predictor.append(r * length + at + targets - 1)
            target_ids.append(log.ids[targets])
            stream.append(np.full(len(targets), i))
            index.append(targets)
            video.append((i, r * length + at + np.flatnonzero(log.kind == Kind.VIDEO)))
            at = end
    # Video features arrive log by log in the callers' order, not in row order.
    video.sort(key=lambda item: item[0])

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Rows(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        expiry=torch.from_numpy(expiry),
        lane=torch.from_numpy(lane),
        predictor=joined(predictor),
        target_ids=joined(target_ids),
        stream=joined(stream),
        target_index=joined(index),
        video_index=joined([where for _, where in video]),
        regions=pack_regions(logs, rows, length),
    )
