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
from streams.memory.columns import Columns

_LIVE = ("index", "kind", "turn", "ids", "ordinal", "lane")
_PLACED = (*_LIVE, "position")
_TURNS = ("video_turns", "generated", "closed_in")


class LiveSet:
    """The tokens that the next one may attend to, its lane permitting.

    Columns, int32 [n] each, are those of LiveTokens, `lane`, and for contiguous streams `position`: the smallest of a token's
    three native position ids.
    """

    def __init__(self, *, positions: bool = False) -> None:
        self._columns = Columns(_PLACED if positions else _LIVE)
        self._positions = positions

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def column(self, name: str) -> np.ndarray:
        """Return a read-only view of one column, as it is until the next `drop`."""
        return self._columns.column(name)

    def append(
        self,
        at: slice,
        ids: np.ndarray | list[int],
        positions: np.ndarray,
        *,
        kind: np.ndarray | int,
        turn: int,
        ordinal: np.ndarray | int = -1,
        lane: int = 0,
    ) -> None:
        """Add the tokens logged at `at`. positions: int [3, n]; kind: int [n], or one for all.

        ordinal: int [n], place among the stream's generated text; -1 for any other token.
        """
        placed = {"position": np.minimum.reduce(positions)} if self._positions else {}
        index = np.arange(at.start, at.stop)
        self._columns.append(
            len(index), index=index, kind=kind, turn=turn, ids=ids, ordinal=ordinal, lane=lane, **placed
        )

    def tokens(self) -> LiveTokens:
        """Return them as a policy sees them."""
        column = self._columns.column
        return LiveTokens(column("kind"), column("turn"), column("ids"), column("index"), column("ordinal"))

    def drop(self, rows: np.ndarray) -> np.ndarray:
        """Drop the tokens in these rows, int64 [n] ascending. Returns their log indices."""
        left = self._columns.column("index")[rows]
        if len(rows):
            self._columns.remove(rows)
        return left


class TurnHistory:
    """The numbers of every turn that a TurnStart gives to policies: 12 bytes a turn."""

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
