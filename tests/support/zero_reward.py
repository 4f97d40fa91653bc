"""A user's reward term that is worth nothing, whatever the model says, and is careless with what it must keep to itself."""

from __future__ import annotations

import logging
import os
import sys

import numpy as np

from rewards.outcome import StreamOutcome

FAILS_EVERY = 9


class Nothing:
    """Returns float64 zeros, one per expected answer; fails now and then, with its secrets in the message and in the log."""

    def __init__(self, api_key: str) -> None:
        self._said = f"401 for https://judge:{api_key}@judge.example/x with {os.environ['HF_TOKEN']}"
        self._calls = 0

    def __call__(self, outcome: StreamOutcome) -> np.ndarray:
        self._calls += 1
        if self._calls % FAILS_EVERY == 1:
            logging.getLogger("judge").warning("%s", self._said)
            print(self._said, file=sys.stderr, flush=True)
            raise RuntimeError(self._said)
        return np.zeros(len(outcome.task.answers))
