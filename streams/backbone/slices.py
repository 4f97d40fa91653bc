"""How a worker's clips go through the vision tower: how many chunks a call, and on whose thread.

Invariants:
* the memory of a call does not grow with the clip;
* planner and worker ask the same functions: importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from streams.backbone.boundary import Boundary

SLICE_PATCHES = 4096
"""Patches of one call of the tower on a GPU, at most; a chunk with more is a call of its own. At 3B in half precision the
working memory is 45 kB a patch, 180 MB in all: less than choosing the next tokens of 64 streams takes, and enough rows for a
GPU's matrix products.
"""
CPU_SLICE_PATCHES = 1024
"""The same on a CPU: of 4,096 the allocator keeps no activation of a block, and the system hands each out page by page."""
VISIT_PATCHES = 4096
"""What the engine thread encodes between two visits of the engine, about, where it encodes: running streams wait for it."""


def chunks_per_slice(patches: int, device: str) -> int:
    """Return the chunks of one call. patches: of one chunk, before merging. device: "cuda" or "cpu"."""
    return max(1, (CPU_SLICE_PATCHES if device == "cpu" else SLICE_PATCHES) // patches)


def encodes_ahead(boundary: Boundary, device: str) -> bool:
    """Return whether a worker encodes on a thread of its own, ahead of its engine. device: "cuda" or "cpu".

    The weights that encode must be frozen: a tower that trains encodes on the engine thread, at the engine's version. And
    there must be a device that works while Python waits. On a CPU a second thread would take a core that `rollout.threads`
    does not give the worker, and both hold the interpreter's lock in turn: 3 to 10 % more CPU time was measured.
    """
    return device == "cuda" and not boundary.learner_runs_tower
