"""Typed settings of the job, of evaluation and of watching (Hydra keys `job`, `eval`, `watch`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STAGES = ("data", "sft", "rl", "eval", "watch")


@dataclass(frozen=True)
class JobConfig:
    """`job=NAME`: the stages it runs, in order."""

    name: str = "all"
    stages: list[str] = field(default_factory=lambda: ["data", "sft", "rl", "eval"])

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"job.stages={self.stages}: stages are {', '.join(STAGES)}")
        if "watch" in self.stages and len(self.stages) > 1:
            raise ValueError(f"job.stages={self.stages}: watch runs alone")


@dataclass(frozen=True)
class EvalConfig:
    """checkpoint: `auto` = what the run has made (after SFT and after RL), or a folder. conditions: also evaluate the
    recall questions with forced empty thoughts and under `recent_frames` with the same window. score_logs: have the learner
    score the evaluation's logs (`monitor` has the limits).
    every: RL steps between evaluations while training (0 = none), of the first `tasks` held-out tasks (0 = all);
    `checkpoints/rl/best` keeps the checkpoint with the largest `best` of them (reward, timing, accuracy_<category>).
    transcripts: streams written under run_root/transcripts (0 = none). transcript_mb: size of their page, at most.
    """

    checkpoint: str = "auto"
    every: int = 0
    tasks: int = 0
    best: str = "reward"
    conditions: bool = True
    score_logs: bool = True
    transcripts: int = 24
    transcript_mb: float = 8.0

    def __post_init__(self) -> None:
        if self.transcripts < 0:
            raise ValueError(f"eval.transcripts={self.transcripts} must be a number of streams, 0 for none")
        if not 0.25 <= self.transcript_mb <= 512:
            raise ValueError(f"eval.transcript_mb={self.transcript_mb} must lie in [0.25, 512]")
        if self.every < 0 or self.tasks < 0:
            raise ValueError(f"eval.every={self.every} and eval.tasks={self.tasks} must not be negative")
        if self.best not in ("reward", "timing") and not self.best.startswith("accuracy_"):
            raise ValueError(f"eval.best={self.best!r} is not one of reward, timing, accuracy_all, accuracy_<category>")


@dataclass(frozen=True)
class WatchConfig:
    """job=watch: stream a file through the engine. at: second at which the query arrives; seconds: how long to watch
    (0 = the whole file). json: print one JSON line per turn instead of words.
    """

    video: str = ""
    query: str = ""
    at: float = 0.0
    seconds: float = 0.0
    json: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.at < math.inf and 0 <= self.seconds < math.inf):
            raise ValueError(
                f"watch.at={self.at} and watch.seconds={self.seconds} must be numbers of seconds, not negative"
            )
        if self.query and 0 < self.seconds <= self.at:
            raise ValueError(
                f"watch.at={self.at:g} with watch.seconds={self.seconds:g}: the query would come after the last second "
                "watched; raise seconds, or leave it out to watch the whole file"
            )
