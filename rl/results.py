"""What the RL stage counts and reports.

Invariants:
* every checkpoint contains the `RLResult`, so a resumed stage goes on counting where the checkpoint was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards.compose import RewardResult
from rl.groups.spread import GivenUp
from runtime.store.manifests import plain
from runtime.store.ranges import Ranges
from streams.data.dataset import SkippedSample
from streams.log.mismatch import LogpDiff
from streams.messages import GroupSummary, TrainReport


@dataclass(frozen=True)
class ReadyGroup:
    """A scored group, ready for a batch.

    Attributes:
        summary: The group's light half.
        payload: Object reference to its GroupPayload.
        results: One reward per stream.
    """

    summary: GroupSummary
    payload: Any
    results: tuple[RewardResult, ...]


@dataclass
class RLResult:
    """What the RL stage reports. clips_encoded and distinct_clips count this attempt, all else counts the whole stage.

    Attributes:
        steps: Optimiser steps.
        max_age: Largest age of a trained group, in versions.
        mean_reward_first, mean_reward_last: Mean reward of the first and of the last step; None before the first.
        versions_seen: Weight versions that sampled any trained token.
        skipped: Samples that were left out.
        dropped_groups: Groups that could not be trained.
        dropped_clip_seconds: Their video's length, so that a loss of long videos shows.
        monitor: Mismatch that the workers measured by re-scoring their own streams.
        age0: Mismatch that the learner measured on training streams of its own version.
        published, published_by_kind: Mismatch on the weights that the workers swapped in last; also by kind of token.
        saturated_at: Mean reward with which the stage ended before its last step (`rl.saturation`); None if it did not.
        given_up: Groups that were not trained since they taught nothing.
        sampled_tokens: Sampled tokens of all trained groups.
        clips_encoded: Clips that the workers encoded.
        distinct_clips: Different clips that were rolled out.
        best: Step, metric and value of the best checkpoint; {} without one.
        seconds: Time of all attempts, up to the checkpoints that they were continued from.
        deaths: Processes that died and were replaced, by the actor's name.
    """

    steps: int = 0
    max_age: int = 0
    mean_reward_first: float | None = None
    mean_reward_last: float | None = None
    versions_seen: set[int] = field(default_factory=set)
    skipped: list[SkippedSample] = field(default_factory=list)
    dropped_groups: int = 0
    dropped_clip_seconds: float = 0.0
    given_up: GivenUp = field(default_factory=GivenUp)
    monitor: LogpDiff = field(default_factory=LogpDiff)
    age0: LogpDiff = field(default_factory=LogpDiff)
    published: LogpDiff = field(default_factory=LogpDiff)
    published_by_kind: dict[str, LogpDiff] = field(default_factory=dict)
    sampled_tokens: int = 0
    clips_encoded: int = 0
    distinct_clips: int = 0
    saturated_at: float | None = None
    best: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    deaths: dict[str, int] = field(default_factory=dict)

    def count_step(
        self, report: TrainReport, groups: Sequence[ReadyGroup], ages: Sequence[int], mean_reward: float | None
    ) -> None:
        """Count an optimiser step that trained `groups`, each at its age in `ages`."""
        self.steps = report.version
        self.given_up.since_step = 0
        self.max_age = max(self.max_age, *ages)
        for group in groups:
            self.versions_seen.update(group.summary.versions)
        self.monitor = LogpDiff.merge([self.monitor, *(g.summary.monitor for g in groups)])
        self.age0 = LogpDiff.merge([self.age0, report.age0])
        self.sampled_tokens += sum(g.summary.tokens for g in groups)
        if self.mean_reward_first is None:
            self.mean_reward_first = mean_reward
        self.mean_reward_last = mean_reward

    def counters(self) -> dict[str, Any]:
        """Return the result as a checkpoint's state has it, JSON-ready."""
        return plain(asdict(self)) | {"versions_seen": plain(Ranges.of(self.versions_seen).pairs)}

    @classmethod
    def restore(cls, counters: dict[str, Any]) -> RLResult:
        """Return the result that a checkpoint's state has as JSON."""
        values = dict(counters)
        seen = values.get("versions_seen", ())
        # Earlier versions listed every one.
        values["versions_seen"] = {*Ranges(pair if isinstance(pair, list) else (pair, pair) for pair in seen)}
        values["skipped"] = [SkippedSample(**sample) for sample in values.get("skipped", ())]
        values["given_up"] = GivenUp(**values.get("given_up", {}))
        for key in ("monitor", "age0", "published"):
            values[key] = LogpDiff(**values.get(key, {}))
        by_kind = values.get("published_by_kind", {})
        values["published_by_kind"] = {kind: LogpDiff(**diff) for kind, diff in by_kind.items()}
        return cls(**(values | {"clips_encoded": 0, "distinct_clips": 0}))
