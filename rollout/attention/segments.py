"""A segment as the attention backends see it.

Invariants:
* the last `rows` slots of a segment are its own tokens', in order;
* its i-th token attends to every slot before its own, and to its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """`rows` query tokens that start at `start` in the packed forward.

    Attributes:
        slots: int64 [n >= rows], what they may see.
        range: the range [first, stop) of slots that these are, in any order; None: it is not known, or they are none.
    """

    start: int
    rows: int
    slots: np.ndarray
    range: tuple[int, int] | None = None
