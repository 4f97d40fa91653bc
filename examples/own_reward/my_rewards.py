"""A reward term of your own: docs/rewards.md explains it."""

from dataclasses import dataclass

import numpy as np

from rewards import StreamOutcome, match_answers


@dataclass(frozen=True)
class Brief:
    """1 for a response of up to `words` words, `slope` less for every word more, 0 without a response."""

    words: int = 8
    slope: float = 0.2

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words!r} must be at least 1")

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        values = []
        for match in match_answers(outcome):
            said = 0 if match.response is None else len(match.response.split())
            values.append(max(0.0, 1.0 - self.slope * max(0, said - self.words)) if said else 0.0)
        return np.array(values)
