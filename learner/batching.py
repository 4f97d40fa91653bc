"""How the logs of an optimiser step become micro-batches, the same number of them on every rank.

Invariants:
- Every rank runs the same forwards in the same order, because under ZeRO-3 each of them gathers parameters
  collectively.
- A rank with less work runs idle micro-batches, which contribute exactly nothing.
- A stream is never cut: all its targets are in one micro-batch, in the order of its log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from streams.log.mismatch import OffToken, most_telling
from streams.log.record import StreamLog
from streams.messages import GroupPayload
from streams.scoring.packing import Rows, pack, plan_micro_batches

IDLE_TOKENS = 128
"""Tokens of an idle row: one block of the attention mask."""


@dataclass(frozen=True)
class TrainItem:
    """One group with its media resolved.

    Attributes:
        payload: Logs and media array, see GroupPayload.
        advantages: One float64 array per log, with one value per target token in the log's order; empty in the cold start.
    """

    payload: GroupPayload
    advantages: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class MicroBatchWork:
    """The modules that all ranks run in one micro-batch.

    Attributes:
        vision: Kind of media that passes through vision modules: "frames" (tower and mergers), "pre_merger" (mergers
            only), or "" for none. Ranks whose media are of different kinds have been refused before (`learner.step`).
        head_chunks: How many chunks of targets the LM head is called with.
    """

    vision: str
    head_chunks: int

    def cover(self, other: MicroBatchWork) -> MicroBatchWork:
        """Return the smallest work that includes both."""
        return MicroBatchWork(self.vision or other.vision, max(self.head_chunks, other.head_chunks))


def common_work(ranks: list[tuple[MicroBatchWork, ...]]) -> list[MicroBatchWork]:
    """Return, micro-batch by micro-batch, the smallest work that covers every rank's."""
    longest = max(len(works) for works in ranks)
    return [reduce(MicroBatchWork.cover, (works[i] for works in ranks if i < len(works))) for i in range(longest)]


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward of this rank, and what the logs record about its N targets.

    Attributes:
        rows: The packed logs; `rows.stream` are indices into `logs`.
        media: (kind, array) of each distinct clip.
        order: For each packed log, the index in `media` of the clip it shows.
        logs: All logs of this rank's work.
        advantages: One float64 array per log of `logs`, one value per target; empty in the cold start and in scoring.
    """

    rows: Rows
    media: list[tuple[str, np.ndarray]]
    order: list[int]
    logs: list[StreamLog]
    advantages: list[np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """Return the values [N] of a log column at the targets, in the column's dtype."""
        dtype = getattr(self.logs[0], name).dtype if self.logs else np.dtype(np.float64)
        return self._at_targets(lambda i: getattr(self.logs[i], name), dtype)

    def advantage(self) -> np.ndarray:
        """Return the advantages of the targets, float64 [N]."""
        return self._at_targets(lambda i: by_token(self.logs[i], self.advantages[i]), np.dtype(np.float64))

    def of_version(self, version: int) -> np.ndarray:
        """Return which targets belong to streams sampled wholly at `version`, bool [N]."""
        whole = np.array([log.single_version == version for log in self.logs], dtype=bool)
        return whole[self.rows.stream.numpy()]

    def outlier(self, differences: np.ndarray, limit: float, chosen: np.ndarray | None = None) -> OffToken | None:
        """Return the target whose mismatch is most telling; None if there is no target.

        Args:
            differences: float [N], re-scored minus behaviour log-prob.
            limit: Absolute difference above which a token is an outlier.
            chosen: bool [N], the targets to choose from; None = all.
        """
        stream, index = self.rows.stream.numpy(), self.rows.target_index.numpy()
        chosen = np.ones(len(stream), bool) if chosen is None else chosen
        tokens = []
        for s in np.unique(stream[chosen]):
            mine = chosen & (stream == s)
            tokens.append(OffToken.of(self.logs[int(s)], index[mine], differences[mine], limit))
        return most_telling(tokens)

    def furthest(self, differences: np.ndarray) -> tuple[float, str]:
        """Return (absolute value, stream id) of the largest of the differences [N]; (-1, "none") if N is 0."""
        if not len(differences):
            return -1.0, "none"
        distance = np.abs(differences)
        at = int(distance.argmax())
        return float(distance[at]), self.logs[int(self.rows.stream[at])].header.stream_id

    def _at_targets(self, column_of: Callable[[int], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Gather a column at the targets. column_of(i): values [tokens] of log i; called for packed logs only."""
        stream, index = self.rows.stream.numpy(), self.rows.target_index.numpy()
        values = np.zeros(self.rows.num_targets, dtype)
        for s in np.unique(stream):
            mine = stream == s
            values[mine] = column_of(int(s))[index[mine]]
        return values


def by_token(log: StreamLog, advantages: np.ndarray) -> np.ndarray:
    """Spread advantages, one per target, over the log's tokens, float64 [tokens].

    Every other token gets NaN, so that an advantage read at the wrong token makes the loss NaN and is noticed.
    """
    values = np.full(len(log), np.nan)
    values[log.target] = advantages
    return values


class RankWork:
    """This rank's share of a step (or of a scoring call), cut into micro-batches."""

    def __init__(
        self,
        items: list[TrainItem],
        which: str,
        blanks: dict[str, np.ndarray],
        *,
        row_tokens: int,
        max_tokens: int,
        head_chunk: int,
    ) -> None:
        """Plan the micro-batches.

        Args:
            items: This rank's groups.
            which: Name of the bool column that marks targets: "target" or "sampled".
            blanks: One-token media for idle micro-batches, by kind, the kind that needs the most work first.
            row_tokens, max_tokens: Tokens of a row and of a micro-batch, see LearnerConfig.
            head_chunk: Targets whose logits exist at once.
        """
        self._items, self._which, self._blanks = items, which, blanks
        self.logs: list[StreamLog] = [log for item in items for log in item.payload.logs]
        self._clip_of = [i for i, item in enumerate(items) for _ in item.payload.logs]
        self.advantages = [values for item in items for values in item.advantages]
        self._batches = plan_micro_batches([len(log) for log in self.logs], row_tokens, max_tokens)
        self.micro_batches = tuple(self._measure(batch, head_chunk) for batch in self._batches)

    @property
    def temperatures(self) -> set[float]:
        return {log.header.score_temperature for log in self.logs}

    @property
    def media_kinds(self) -> set[str]:
        return {item.payload.media_kind for item in self._items}

    def micro_batch(self, i: int, work: MicroBatchWork) -> MicroBatch:
        """Return the i-th micro-batch, or an idle one of that work if this rank has fewer than i + 1."""
        if i >= len(self._batches):
            # The blank clip replaces the row's first token, so that backward passes through the vision modules as it
            # does on the ranks with a real clip: their collectives must meet there, too.
            media = [(work.vision, self._blanks[work.vision])] if work.vision else []
            return MicroBatch(idle_rows(len(media)), media, [0] * len(media), self.logs, self.advantages)
        # Streams of a group share one clip: each distinct one is encoded once, then shown wherever `order` says.
        rows = pack(self.logs, self._batches[i], which=self._which)
        clips = [self._clip_of[m] for m in self._members(self._batches[i])]
        distinct = sorted(set(clips))
        place = {clip: at for at, clip in enumerate(distinct)}
        payloads = [self._items[clip].payload for clip in distinct]
        media = [(p.media_kind, p.media) for p in payloads]
        return MicroBatch(rows, media, [place[clip] for clip in clips], self.logs, self.advantages)

    def _measure(self, batch: list[list[int]], head_chunk: int) -> MicroBatchWork:
        members = self._members(batch)
        targets = sum(int(getattr(self.logs[m], self._which).sum()) for m in members)
        kinds = {self._items[self._clip_of[m]].payload.media_kind for m in members}
        vision = next((kind for kind in self._blanks if kind in kinds), "")
        return MicroBatchWork(vision, max(1, -(-targets // head_chunk)))

    @staticmethod
    def _members(batch: list[list[int]]) -> list[int]:
        return sorted(m for row in batch for m in row)


def idle_rows(video_tokens: int) -> Rows:
    """Return one row of arbitrary tokens without targets: it runs every module and has no loss."""
    none = torch.zeros(0, dtype=torch.long)
    zeros = torch.zeros((1, IDLE_TOKENS), dtype=torch.long)
    return Rows(
        ids=zeros,
        positions=torch.arange(IDLE_TOKENS).expand(3, 1, -1).contiguous(),
        expiry=torch.full_like(zeros, IDLE_TOKENS),
        lane=zeros,
        predictor=none,
        target_ids=none,
        stream=none,
        target_index=none,
        video_index=torch.arange(video_tokens),
    )
