"""How many chunks of a clip the vision tower takes in one call where nothing is trained through it.

Invariants:
* the memory of a call does not grow with the clip: planner and tower ask the same function;
* importing it loads neither torch nor transformers.
"""

from __future__ import annotations

SLICE_PATCHES = 4096
"""Patches of one call of the tower, at most; a chunk with more is a call of its own. A CPU's caches hold the activations of so
many: a whole clip of 25,000 takes a third longer (towers of 256 columns). At 3B in half precision the working memory is 45 kB a
patch, 180 MB in all: less than choosing the next tokens of 64 streams takes, and enough rows for a GPU's matrix products.
"""


def chunks_per_slice(patches: int) -> int:
    """Return the chunks of one call. patches: of one chunk, before merging."""
    return max(1, SLICE_PATCHES // patches)
