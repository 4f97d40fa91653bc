"""How a worker's clips go through the vision tower: how many chunks a call, and on whose thread.

Invariants:
* the memory of a call does not grow with the clip;
* planner and worker ask the same functions: importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from streams.backbone.boundary import Boundary

SLICE_PATCHES = 4096
"""Patches of one call of the tower, at most; a chunk with more is a call of its own. A CPU's caches hold the activations of so
many: a whole clip of 25,000 takes a third longer (towers of 256 columns). At 3B in half precision the working memory is 45 kB a
patch, 180 MB in all: less than choosing the next tokens of 64 streams takes, and enough rows for a GPU's matrix products.
"""


def chunks_per_slice(patches: int) -> int:
    """Return the chunks of one call. patches: of one chunk, before merging."""
    return max(1, SLICE_PATCHES // patches)


def encodes_ahead(boundary: Boundary, device: str) -> bool:
    """Return whether a worker encodes on a thread of its own, ahead of its engine. device: "cuda" or "cpu".

    The weights that encode must be frozen: a tower that trains encodes on the engine thread, at the engine's version. And
    there must be a device that works while Python waits. On a CPU a second thread would take a core that `rollout.threads`
    does not give the worker, and both hold the interpreter's lock in turn: 3 to 10 % more CPU time was measured.
    """
    return device == "cuda" and not boundary.learner_runs_tower
