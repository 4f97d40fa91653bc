"""Which parameters train: the freeze modes, and shell-style patterns over parameter names.

Names are those of `model.named_parameters()`.

Invariants:
* one function decides, for the learner and for every estimate;
* importing it loads no torch: the driver counts what a learner will train from the names in a checkpoint's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from streams.backbone.boundary import Boundary


def trained(names: Iterable[str], mode: str, patterns: Sequence[str] = ()) -> list[str]:
    """Return the names that train under `learner.freeze` (mode) and `learner.freeze_names` (patterns).

    Raises ValueError for an unknown mode, a pattern that matches nothing, or if nothing is left to train.
    """
    boundary = Boundary.of(mode)
    every = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            nearest = ", ".join(get_close_matches(pattern, every, n=3, cutoff=0.0))
            raise ValueError(
                f"learner.freeze_names: the pattern {pattern!r} matches no parameter; nearest: {nearest} (a pattern covers "
                "the whole name, * also matches dots)"
            )
    left = [
        name
        for name in every
        if not boundary.below(name) and not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not left:
        raise ValueError(
            f"learner.freeze={mode} with learner.freeze_names={list(patterns)} freezes all {len(every)} parameters: leave "
            "something to train"
        )
    return left
