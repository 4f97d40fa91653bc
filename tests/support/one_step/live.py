"""What a stream keeps between turns: its live tokens, and a few numbers for every turn.

The writer keeps both beside the log, so that an eviction reads the live tokens and never the whole log.

Invariants:
* live tokens are in log order;
* the numbers of a turn are written when it starts (`closed_in`: when its query closes).
"""

from __future__ import annotations

import numpy as np

from streams.log.record import NEVER
from streams.memory import LiveTokens, TurnStart
from tests.support.one_step.columns import Columns, Spec

_LIVE: Spec = {
    "index": np.dtype(np.int64),
    "kind": np.dtype(np.int8),
    "turn": np.dtype(np.int32),
    "ids": np.dtype(np.int32),
    "ordinal": np.dtype(np.int64),
    "lane": np.dtype(np.int8),
    "position": np.dtype(np.int64),
}


class LiveSet:
    """The tokens that the next one may attend to, its lane permitting.

    Columns are those of LiveTokens, `lane`, and `position`: the smallest of a token's three native position ids.
    """

    def __init__(self) -> None:
        self._columns = Columns(_LIVE)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def column(self, name: str) -> np.ndarray:
        return self._columns.column(name)

    def append(
        self,
        at: slice,
        ids: np.ndarray | list[int],
        positions: np.ndarray,
        *,
        kind: int,
        turn: int,
        ordinal: int = -1,
        lane: int = 0,
    ) -> None:
        """Add the tokens logged at `at`, of one kind. positions: int [3, n].

        ordinal: place among the stream's generated text, for a single token of it; -1 otherwise.
        """
        index = np.arange(at.start, at.stop)
        position = positions.min(axis=0)
        self._columns.append(
            len(index), index=index, kind=kind, turn=turn, ids=ids, ordinal=ordinal, lane=lane, position=position
        )

    def tokens(self) -> LiveTokens:
        """Return them as a policy sees them."""
        return LiveTokens(*(self.column(name) for name in ("kind", "turn", "ids", "index", "ordinal")))

    def drop(self, leaving: np.ndarray) -> np.ndarray:
        """Drop the tokens where `leaving`, bool [n]. Returns their log indices."""
        left = self.column("index")[leaving]
        if len(left):
            self._columns.keep(~leaving)
        return left


_TURNS: Spec = {name: np.dtype(np.int64) for name in ("video_turns", "generated", "closed_in")}


class TurnHistory:
    """The numbers of every turn that a TurnStart gives to policies: 24 bytes a turn."""

    def __init__(self) -> None:
        self._columns = Columns(_TURNS)
        self._open: list[int] = []
        self._video_turns = 0

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def begin(self, *, has_video: bool, video_tokens: int, generated: int) -> TurnStart:
        """Start the next turn. generated: generated text tokens of the turns before it."""
        turn = len(self._columns)
        self._columns.append(1, video_turns=self._video_turns, generated=generated, closed_in=NEVER)
        self._video_turns += has_video
        column = self._columns.column
        return TurnStart(
            turn, has_video, video_tokens, column("video_turns"), column("generated"), column("closed_in")[:turn]
        )

    def ask(self, until: int | None) -> None:
        """Record that the latest turn has a query, closed in turn `until` or (None) by a response."""
        turn = len(self._columns) - 1
        if until is None:
            self._open.append(turn)
        else:
            self._columns.write("closed_in", np.array([turn]), until)

    def answered(self) -> None:
        """Record that the latest turn responded, which closes every query that waits for a response."""
        if self._open:
            self._columns.write("closed_in", np.array(self._open), len(self._columns) - 1)
            self._open.clear()
