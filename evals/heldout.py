"""Held-out evaluation: every held-out task watched once, greedily, by the rollout workers.

Invariants:
* nothing after a turn's own chunk is shown;
* a question that is not answered counts as wrong;
* a stream that failed is scored as one that never spoke;
* accuracy takes the first response at or after the query, whatever its time;
* results are in the order of the tasks, whichever stream ends first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.schema import RunConfig
from evals.categories import ALL, category_name
from rewards.compose import RewardResult
from rewards.scripted import silent_turns
from runtime.cluster.session import Session
from runtime.cluster.spread import spread
from runtime.mismatch_gate import MismatchGate
from runtime.rows import play_oracle
from runtime.tracking.progress import Progress
from streams.data.dataset import SkippedSample, at_row
from streams.log.mismatch import LogpDiff
from streams.memory import MemoryConfig
from streams.messages import GroupSummary, RewardJob, RolloutTask
from streams.task import Plan, StreamTask
from streams.turns import ParsedTurn


@dataclass(frozen=True)
class Condition:
    """The condition under which a checkpoint is evaluated. memory: None = as it was trained."""

    name: str
    memory: MemoryConfig | None = None
    empty_thoughts: bool = False


@dataclass(frozen=True)
class WatchedStream:
    """One held-out stream that is over, failed or not. payload: reference to its log; None if nobody needs it."""

    request: RolloutTask
    summary: GroupSummary
    payload: Any = None

    @property
    def task(self) -> StreamTask:
        return self.request.task


@dataclass(frozen=True)
class ScoredStream:
    """One held-out stream with its reward.

    Attributes:
        plan: Turns and chunk length with which it was run and scored.
        payload: Reference to its log; None if it failed.
        failed: Why it could not be run; None if it could.
    """

    task: StreamTask
    plan: Plan
    turns: tuple[ParsedTurn, ...]
    result: RewardResult
    payload: Any = None
    failed: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """n: questions. reward, timing: means over streams. accuracy: by category (whatever the rows call it) and over all."""

    condition: str
    n: int
    reward: float
    timing: float
    accuracy: dict[str, float]
    skipped: tuple[SkippedSample, ...]
    streams: tuple[ScoredStream, ...] = ()
    evicted_tokens: int = 0
    log_tokens: int = 0
    by_category: dict[str, int] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float | None]:
        """What is charted about an evaluation, below its own prefix."""
        values: dict[str, float | None] = {"reward": self.reward, "timing": self.timing}
        return values | {f"accuracy_{mode}": value for mode, value in self.accuracy.items()}

    @property
    def payloads(self) -> tuple[Any, ...]:
        """The logs of the streams that could be run, by reference."""
        return tuple(stream.payload for stream in self.streams if stream.failed is None)


def evaluate(
    config: RunConfig,
    session: Session,
    tasks: Sequence[StreamTask],
    condition: Condition,
    progress: Progress,
    stage: str,
) -> EvalResult:
    """Run and score every task once under `condition`, on the weights that the workers run now.

    Raises RuntimeError if the mismatch gate refuses a stream, or an actor dies; TimeoutError if one does not reply.
    """

    def send(worker: Any, item: tuple[int, RolloutTask]) -> Any:
        return worker.rollout.options(num_returns=2).remote(item[1])

    def name(item: tuple[int, RolloutTask]) -> str:
        return item[1].group

    def given_up(item: tuple[int, RolloutTask], worker: int, why: str) -> GroupSummary:
        return GroupSummary(item[1].group, item[1].task.id, worker, failed=why)

    requests = [stream_request(config, task, condition, stage) for task in tasks]
    gate = MismatchGate(config)
    done: dict[int, WatchedStream] = {}
    what = f"evaluation {condition.name}"
    summary: GroupSummary
    for (index, request), summary, (_, payload) in spread(
        session.crew, enumerate(requests), send, config.rollout.max_streams, what, name, given_up
    ):
        task = request.task
        done[index] = WatchedStream(request, summary, payload)
        gate.observe(f"rollout worker {summary.worker}", summary.monitor, summary.off)
        if summary.failed is not None:
            progress.say(f"eval: failed {task.id}: {summary.failed}{at_row(task)}")
    watched = [done[index] for index in range(len(tasks))]
    jobs = reward_jobs(watched)
    scores = session.crew.score(jobs, "the evaluation")
    evicted = sum(stream.summary.evicted_tokens for stream in watched)
    log_tokens = sum(stream.summary.log_tokens for stream in watched)
    return collect(condition.name, scored_streams(watched, jobs, scores), evicted, log_tokens)


def stream_request(config: RunConfig, task: StreamTask, condition: Condition, stage: str) -> RolloutTask:
    """Return the request for one greedy stream over `task`. stage: distinguishes its name in several evaluations."""
    return RolloutTask(
        group=f"{stage}:{condition.name}/{task.id}",
        task=task,
        plan=config.data.plan_of(task),
        streams=1,
        temperature=0.0,
        memory=condition.memory,
        empty_thoughts=condition.empty_thoughts,
    )


def reward_jobs(watched: Sequence[WatchedStream]) -> tuple[RewardJob, ...]:
    """Return what the scorer is asked about held-out streams, in their order. One that failed counts as silence."""
    jobs = []
    for stream in watched:
        plan = stream.request.plan
        turns = stream.summary.turns if stream.summary.failed is None else (silent_turns(plan.turns),)
        jobs.append(RewardJob(stream.task.id, stream.task, plan, turns))
    return tuple(jobs)


def scored_streams(
    watched: Sequence[WatchedStream], jobs: Sequence[RewardJob], scores: Sequence[tuple[RewardResult, ...]]
) -> tuple[ScoredStream, ...]:
    """Return the streams with the scorer's replies to their `jobs`."""
    return tuple(
        ScoredStream(
            job.task,
            job.plan,
            job.turns[0],
            score[0],
            stream.payload if stream.summary.failed is None else None,
            stream.summary.failed,
        )
        for stream, job, score in zip(watched, jobs, scores, strict=True)
    )


def learner_mismatch(diff: LogpDiff) -> dict[str, float | None]:
    """Return the metrics of held-out logs that the learner scored at their weights; None if no token was compared."""
    return {
        "mismatch/learner_max": diff.max,
        "mismatch/learner_mean": diff.mean,
        "mismatch/learner_k3": diff.k3,
        "mismatch/learner_tokens": float(diff.tokens),
    }


def collect(name: str, streams: tuple[ScoredStream, ...], evicted: int = 0, log_tokens: int = 0) -> EvalResult:
    """Return the means over `streams`, by category and over all."""
    by_category: dict[str, list[bool]] = {}
    for stream in streams:
        for answer in stream.result.answers:
            by_category.setdefault(category_name(answer.category), []).append(answer.correct)
    every = [correct for values in by_category.values() for correct in values]
    skipped = [SkippedSample.failure(s.task, s.failed) for s in streams if s.failed is not None]
    return EvalResult(
        condition=name,
        n=len(every),
        reward=float(np.mean([s.result.total for s in streams])),
        timing=float(np.mean([answer.timing for s in streams for answer in s.result.answers])),
        accuracy={k: float(np.mean(v)) for k, v in sorted(by_category.items())} | {ALL: float(np.mean(every))},
        skipped=tuple(skipped),
        streams=streams,
        evicted_tokens=evicted,
        log_tokens=log_tokens,
        by_category={k: len(v) for k, v in by_category.items()},
    )


def scripted_rewards(
    config: RunConfig, session: Session, tasks: Sequence[StreamTask], fits: Mapping[str, Mapping[int, str]]
) -> tuple[float, float]:
    """Return the mean rewards of a scripted oracle and of constant silence, from the run's own scorer."""
    plans = [config.data.plan_of(task) for task in tasks]
    jobs = tuple(
        RewardJob(task.id, task, plan, (silent_turns(plan.turns),)) for task, plan in zip(tasks, plans, strict=True)
    )
    scores = session.crew.score(jobs, "the silent script")
    return play_oracle(config, session, tasks, fits).reward, float(np.mean([r[0].total for r in scores]))


def chance(tasks: Sequence[StreamTask], category: str) -> float | None:
    """Return the share of the most common answer in a category; None if it has no question."""
    answers = Counter(a.text for task in tasks if task.category == category for a in task.answers)
    total = sum(answers.values())
    return max(answers.values()) / total if total else None
