"""Lanes: how a turn is spread over the two lanes of a stream, and the copy of a turn that outlives it.

Source: VST's memory of thoughts with their time span (arXiv 2603.12262).

Invariants:
* lane 0 never attends to lane 1;
* the words of a copy are the model's own ids, never re-tokenised, and none of them is a control token: what a model
  wrote cannot pass for a turn;
* importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

from enum import Enum

Span = tuple[float, float]
"""Begin and end of a turn, in seconds from the start of its stream."""


class Lanes(Enum):
    """How a policy spreads a turn over the lanes.

    ONE: all of a turn is in lane 0.
    MEMORY: a turn's query is in lane 0. What the turn shows and generates follows in lane 1. A copy of its thought and
    answer (kind MEMORY) follows in lane 0; it is written when the next turn starts and does not attend to lane 1.
    """

    ONE = "one"
    MEMORY = "memory"


SAID = "\n[said]\n"
"""Separates the thought from the answer of a copy."""


def head(span: Span | None) -> str:
    """Return what a copy begins with: its turn's time, to a hundredth of a second; a newline where that is unknown."""
    return "\n" if span is None else f"\n[{_seconds(span[0])}-{_seconds(span[1])} s]\n"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}".rstrip("0").rstrip(".")
