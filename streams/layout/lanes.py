"""Lanes: how a turn is spread over the two lanes of a stream, and the copy of a turn that outlives it.

Lane 0 never attends to lane 1. Invariants: light; the words of a copy are the model's own ids, never
re-tokenised, and none of them is a control token: what a model wrote cannot pass for a turn.
Source: VST's memory of thoughts with their time span (arXiv 2603.12262).
"""

from __future__ import annotations

from enum import Enum

Span = tuple[float, float]
"""Begin and end of a turn, in seconds from the start of its stream."""


class Lanes(Enum):
    """ONE: all of a turn stands in lane 0.

    MEMORY: a turn's query stands in lane 0; then, in lane 1, what it shows and generates; then, in lane 0 again, a copy of
    its thought and answer (kind MEMORY), written when the next turn starts and computed without a look at lane 1.
    """

    ONE = "one"
    MEMORY = "memory"


SAID = "\n[said]\n"
"""Stands between the thought and the answer of a copy."""


def head(span: Span | None) -> str:
    """What a copy begins with: the time of its turn, to a hundredth of a second; a newline where the time is unknown."""
    return "\n" if span is None else f"\n[{_seconds(span[0])}-{_seconds(span[1])} s]\n"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}".rstrip("0").rstrip(".")
