"""The worker's self-check: every N-th finished stream is re-scored by the learner's code, on the weights that made it.

Runs on the engine thread, between two steps.

Invariant: only a stream of one weight version is compared, and only while that version runs. Any other would show
differences that are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rollout.config import SELF_CHECK_HEAD
from rollout.setup import SelfCheckSetup
from streams.backbone.backbone import Backbone
from streams.log.mismatch import LogpDiff, OffToken
from streams.log.record import StreamLog
from streams.scoring.logprobs import behaviour_differences
from streams.support.meter import Meter


@dataclass(frozen=True)
class Checked:
    """A re-scored stream: how far its log-probs are from the engine's, and the token to look at."""

    mismatch: LogpDiff
    outlier: OffToken | None


class SelfCheck:
    """Chooses the streams to re-score, and re-scores them."""

    def __init__(self, backbone: Backbone, setup: SelfCheckSetup, kernel: str, meter: Meter) -> None:
        """kernel: the attention kernel to score with, chosen for the worker's device."""
        self._backbone, self._setup, self._kernel, self._meter = backbone, setup, kernel, meter
        self._finished = 0

    def check(self, stream: StreamLog, features: torch.Tensor, version: int) -> Checked | None:
        """Count a finished stream and re-score it if it is its turn; else None.

        Args:
            features: [chunks, tokens, F], what the stream embedded.
            version: of the weights that the backbone has now.
        """
        self._finished += 1
        every = self._setup.every
        if not every or self._finished % every or stream.single_version != version:
            return None
        with self._meter.phase("self-check"):
            differences = behaviour_differences(
                self._backbone, [stream], [features.flatten(0, 1)], head_chunk=SELF_CHECK_HEAD, attention=self._kernel
            )[0]
        sampled = np.flatnonzero(stream.sampled)
        return Checked(LogpDiff.of(differences), OffToken.of(stream, sampled, differences, self._setup.outlier_above))
