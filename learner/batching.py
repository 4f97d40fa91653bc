"""How the logs of an optimiser step become micro-batches, the same number of them on every rank.

Invariants: groups are shared out by tokens, always in the same way for the same batch; every rank runs
the same forwards in the same order (under ZeRO-3 each of them gathers parameters collectively), so a rank with less work
runs idle micro-batches that contribute exactly nothing; the normaliser is that of all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from learner.losses import decision_weights
from streams.layout.layout import LayoutTokens
from streams.log.mismatch import OffToken, most_telling
from streams.log.record import Kind, StreamLog
from streams.messages import GroupPayload
from streams.scoring.packing import Rows, pack, plan_micro_batches

IDLE_TOKENS = 128
"""Tokens of an idle row: one block of the attention mask."""


@dataclass(frozen=True)
class TrainItem:
    """One group with its media resolved: logs, media array (see GroupPayload), one advantage per log (RL)."""

    payload: GroupPayload
    advantages: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What all ranks run in one micro-batch: what of the vision side, and how many chunks of the head.

    vision: the kind of media that passes through it, "frames" (tower and mergers) or "pre_merger" (mergers); "" if none
    does. Ranks with media of different kinds have been refused before.
    """

    vision: str
    head_chunks: int

    def cover(self, other: Shape) -> Shape:
        return Shape(self.vision or other.vision, max(self.head_chunks, other.head_chunks))


def common_shapes(ranks: list[tuple[Shape, ...]]) -> list[Shape]:
    """The smallest work, micro-batch by micro-batch, that covers every rank's."""
    longest = max(len(shapes) for shapes in ranks)
    return [reduce(Shape.cover, (shapes[i] for shapes in ranks if i < len(shapes))) for i in range(longest)]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of this rank scores. media: distinct clips; order: which of them each log shows."""

    rows: Rows
    media: list[tuple[str, np.ndarray]]
    order: list[int]


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
        """`which` names the bool column that marks targets: 'target' or 'sampled'. blanks: one-token media for idle ranks,
        by kind.
        """
        self._items, self._which, self._blanks = items, which, blanks
        self.logs: list[StreamLog] = [log for item in items for log in item.payload.logs]
        self._clip_of = [i for i, item in enumerate(items) for _ in item.payload.logs]
        self.advantages = np.array([a for item in items for a in item.advantages])
        self._batches = plan_micro_batches([len(log) for log in self.logs], row_tokens, max_tokens)
        self.shapes = tuple(self._shape(batch, head_chunk) for batch in self._batches)

    @property
    def temperatures(self) -> set[float]:
        return {log.header.score_temperature for log in self.logs}

    @property
    def media_kinds(self) -> set[str]:
        return {item.payload.media_kind for item in self._items}

    def micro_batch(self, i: int, shape: Shape) -> MicroBatch:
        """The i-th, or an idle one of that shape where this rank has no more work."""
        if i >= len(self._batches):
            # The blank takes the place of the row's first token, so that its gradient goes the way of any clip's.
            media = [(shape.vision, self._blanks[shape.vision])] if shape.vision else []
            return MicroBatch(idle_rows(len(media)), media, [0] * len(media))
        rows = pack(self.logs, self._batches[i], which=self._which)
        clips = [self._clip_of[m] for m in self._members(self._batches[i])]
        distinct = sorted(set(clips))
        place = {clip: at for at, clip in enumerate(distinct)}
        payloads = [self._items[clip].payload for clip in distinct]
        return MicroBatch(rows, [(p.media_kind, p.media) for p in payloads], [place[clip] for clip in clips])

    def at_targets(self, rows: Rows, column: str) -> np.ndarray:
        """The values [N] that a log column holds at the rows' targets."""
        stream, index = rows.stream.numpy(), rows.target_index.numpy()
        values = np.zeros(rows.num_targets, getattr(self.logs[0], column).dtype if self.logs else np.float64)
        for s in np.unique(stream):
            mine = stream == s
            values[mine] = getattr(self.logs[int(s)], column)[index[mine]]
        return values

    def off_token(
        self, rows: Rows, differences: np.ndarray, limit: float, chosen: np.ndarray | None = None
    ) -> OffToken | None:
        """The target to look at, by re-scored minus behaviour log-prob [N]; of those `chosen`, bool [N], or of all."""
        stream, index = rows.stream.numpy(), rows.target_index.numpy()
        chosen = np.ones(len(stream), bool) if chosen is None else chosen
        tokens = []
        for s in np.unique(stream[chosen]):
            mine = chosen & (stream == s)
            tokens.append(OffToken.of(self.logs[int(s)], index[mine], differences[mine], limit))
        return most_telling(tokens)

    def _shape(self, batch: list[list[int]], head_chunk: int) -> Shape:
        members = self._members(batch)
        targets = sum(int(getattr(self.logs[m], self._which).sum()) for m in members)
        kinds = {self._items[self._clip_of[m]].payload.media_kind for m in members}
        return Shape(next((kind for kind in self._blanks if kind in kinds), ""), max(1, -(-targets // head_chunk)))

    @staticmethod
    def _members(batch: list[list[int]]) -> list[int]:
        return sorted(m for row in batch for m in row)


def idle_rows(video_tokens: int) -> Rows:
    """One row of arbitrary tokens without targets: it runs every module and has no loss."""
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


@dataclass(frozen=True)
class TargetCounts:
    """Target tokens, and those that the cold start weighs apart: both decisions, words of answers."""

    targets: int = 0
    silent: int = 0
    spoken: int = 0
    answer: int = 0

    @classmethod
    def of(cls, logs: list[StreamLog], tokens: LayoutTokens) -> TargetCounts:
        counts = [0, 0, 0, 0]
        for log in logs:
            ids, kind = log.ids[log.target], log.kind[log.target]
            decision = kind == Kind.DECISION
            found = (
                np.ones_like(decision),
                decision & (ids == tokens.silent),
                decision & (ids == tokens.response),
                kind == Kind.RESPONSE,
            )
            counts = [total + int(mask.sum()) for total, mask in zip(counts, found, strict=True)]
        return cls(*counts)

    def __add__(self, other: TargetCounts) -> TargetCounts:
        return TargetCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class SftWeights:
    """Weights of the two decision tokens and of the words of an answer; every other target weighs 1."""

    silent_id: int
    response_id: int
    silent: float
    spoken: float
    answer: float

    @classmethod
    def balanced(cls, counts: TargetCounts, tokens: LayoutTokens, settings: dict[str, float]) -> SftWeights:
        """Weights of a whole step, from the decisions that all its logs demonstrate."""
        silent, spoken = 1.0, 1.0
        if settings["balance_decisions"]:
            silent, spoken = decision_weights(counts.silent, counts.spoken, settings["decision_weight_clamp"])
        return cls(tokens.silent, tokens.response, silent, spoken, settings["answer_weight"])

    def of(self, ids: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """float64 [N] for target ids and kinds [N]."""
        weight = np.where(kind == Kind.RESPONSE, self.answer, 1.0)
        decision = kind == Kind.DECISION
        weight[decision & (ids == self.silent_id)] = self.silent
        weight[decision & (ids == self.response_id)] = self.spoken
        return weight

    def total(self, counts: TargetCounts) -> float:
        """The weights of all targets of a step together: its normaliser."""
        plain = counts.targets - counts.silent - counts.spoken - counts.answer
        return plain + self.silent * counts.silent + self.spoken * counts.spoken + self.answer * counts.answer
