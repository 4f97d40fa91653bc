"""The freeze boundary: up to where the vision side is frozen, and so what a rollout ships to the learner.

Invariants:
* importing it loads neither torch nor transformers;
* everything below the boundary is frozen, so what is cached at it stays valid over every weight swap.
"""

from __future__ import annotations

from enum import StrEnum

VISION = "model.visual."
MERGERS = (f"{VISION}merger.", f"{VISION}deepstack_merger_list.")


class Boundary(StrEnum):
    """The values of `learner.freeze`, from nothing frozen to the whole vision side."""

    NONE = "none"
    TOWER = "tower"
    TOWER_MERGER = "tower+merger"

    @classmethod
    def of(cls, freeze: str) -> Boundary:
        """Return the boundary named by `learner.freeze`. Raises ValueError for a name that does not exist."""
        if freeze not in tuple(cls):
            raise ValueError(f"learner.freeze={freeze!r} is not one of {', '.join(cls)}")
        return cls(freeze)

    @property
    def ships(self) -> str:
        """Kind of media that a rollout ships (GroupPayload.media_kind): the output at the boundary."""
        return {Boundary.NONE: "frames", Boundary.TOWER: "pre_merger", Boundary.TOWER_MERGER: "features"}[self]

    @property
    def worker_merges(self) -> bool:
        """Whether a rollout worker caches pre-merger rows and merges them anew with the weights of the day."""
        return self is Boundary.TOWER

    @property
    def learner_runs_tower(self) -> bool:
        """Whether the learner runs the vision tower on frames, because the tower trains."""
        return self is Boundary.NONE

    @property
    def vision_trains(self) -> bool:
        """Whether any parameter of the vision side trains."""
        return self is not Boundary.TOWER_MERGER

    def below(self, parameter: str) -> bool:
        """Return whether a parameter lies below the boundary: it is frozen, and what is cached depends on it."""
        if self is Boundary.NONE or not parameter.startswith(VISION):
            return False
        return self is Boundary.TOWER_MERGER or not parameter.startswith(MERGERS)
