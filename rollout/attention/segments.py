"""A segment as the attention backends see it.

Invariants:
* the last `rows` slots of a segment are its own tokens', in order;
* its i-th token attends to every slot before its own, and to its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """`rows` query tokens that start at `start` in the packed forward; slots int64 [n >= rows] they may see."""

    start: int
    rows: int
    slots: np.ndarray
