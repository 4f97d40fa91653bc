"""Typed settings of the job, of evaluation and of watching (Hydra keys `job`, `eval`, `watch`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STAGES = ("data", "sft", "rl", "eval", "watch")


@dataclass(frozen=True)
class JobConfig:
    """The stages of `job=NAME`, in the order in which they run."""

    name: str = "all"
    """Name of the job, shown in logs and in MLflow."""
    stages: list[str] = field(default_factory=lambda: ["data", "sft", "rl", "eval"])
    """Stages to run, in this order: any of `data`, `sft`, `rl`, `eval`, or `watch` alone."""
    check_only: bool = False
    """Only check whether these stages could run, and print what was found: `job=doctor`. Nothing is trained, written or
    deleted.
    """

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"job.stages={self.stages}: stages are {', '.join(STAGES)}")
        if "watch" in self.stages and len(self.stages) > 1:
            raise ValueError(f"job.stages={self.stages}: watch runs alone")
        if "watch" in self.stages and self.check_only:
            raise ValueError(
                f"job.check_only=true with job.stages={self.stages}: only the stages of a run can be checked"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out rows, during RL and as a stage of its own, and the transcripts it leaves."""

    checkpoint: str = "auto"
    """What `job=eval` evaluates: `auto` = the run's checkpoints after SFT and after RL, `best` = the one that
    `eval.every` kept, or a checkpoint folder or hub id.
    """
    every: int = 0
    """RL steps between evaluations while training (0 = none)."""
    tasks: int = 0
    """Held-out rows of each evaluation while training: the first N (0 = all). The evaluation stage uses all."""
    best: str = "reward"
    """Metric that decides which evaluation while training is kept in `checkpoints/rl/best`, the larger the
    better: `reward`, `timing`, `accuracy_all` or `accuracy_<category>`.
    """
    conditions: bool = True
    """Also evaluate the recall questions with forced empty thoughts, and under `memory=recent_frames` with the
    same window.
    """
    score_logs: bool = True
    """Let the learner re-score the logs of the evaluation stage and compare with the engine (limits:
    `monitor.max`, `monitor.mean`, `monitor.k3`).
    """
    transcripts: int = 24
    """Streams of each evaluation that are written under `run_root/transcripts` (0 = none)."""
    transcript_mb: float = 8.0
    """Largest size of a transcript page in MB, from 0.25 to 512."""

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
    """`job=watch`: stream one file through the engine."""

    video: str = ""
    """Video file to watch. `job=watch` also accepts `video=FILE`."""
    query: str = ""
    """Question to ask; empty = none."""
    at: float = 0.0
    """Second of the video at which the query arrives."""
    seconds: float = 0.0
    """Seconds to watch, from the start of the video (0 = the whole file). Must be above `watch.at` if there is a
    query.
    """
    json: bool = False
    """Print one JSON object per turn instead of words."""

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
