"""Held-out evaluation: every held-out task watched once, greedily, by the rollout workers.

Owner: evals. Strict protocol: nothing after a turn's own chunk is shown; an unanswered or failed question counts wrong
and its stream's reward 0; accuracy takes the first response at or after the query, whatever its time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.schema import RunConfig
from rewards.compose import RewardResult
from rewards.scripted import oracle_turns, silent_turns
from rl.cluster import Session
from rl.tracking import Progress
from streams.dataset import SkippedSample
from streams.memory import MemoryConfig
from streams.messages import GroupSummary, RewardJob, RolloutTask
from streams.task import StreamTask
from streams.turns import ParsedTurn


@dataclass(frozen=True)
class Condition:
    """Under what a checkpoint is evaluated; memory None = as it was trained."""

    name: str
    memory: MemoryConfig | None = None
    empty_thoughts: bool = False


@dataclass(frozen=True)
class EvalResult:
    """n: questions. reward, timing: means over streams. accuracy: by category and over all. payloads: logs, by reference."""

    condition: str
    n: int
    reward: float
    timing: float
    accuracy: dict[str, float]
    skipped: tuple[SkippedSample, ...]
    payloads: tuple[Any, ...] = ()
    evicted_tokens: int = 0
    log_tokens: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


def evaluate(
    config: RunConfig,
    session: Session,
    tasks: tuple[StreamTask, ...],
    condition: Condition,
    progress: Progress,
    stage: str,
) -> EvalResult:
    """Run and score every task once under `condition`, on the weights the workers now hold."""

    def send(worker: Any, task: StreamTask) -> Any:
        return worker.rollout.options(num_returns=2).remote(stream_request(config, task, condition, stage))

    per_worker = config.rollout.max_streams
    jobs, payloads, skipped = [], [], []
    evicted = log_tokens = 0
    for task, (summary_ref, payload) in session.spread(tasks, send, per_worker, f"evaluation {condition.name}"):
        summary: GroupSummary = session.call(summary_ref, f"the stream of {task.id}")
        if summary.failed is not None:
            skipped.append(SkippedSample(f"task {task.id} ({task.video})", summary.failed))
            progress.say(f"eval: failed {task.id}: {summary.failed}")
            turns = failed_turns(config, task)
        else:
            turns = summary.turns
            payloads.append(payload)
            evicted += summary.evicted_tokens
            log_tokens += summary.log_tokens
        jobs.append(RewardJob(task.id, task, turns, config.data.video.chunk_seconds_of(task)))
    results = [r[0] for r in session.call(session.scorer.score.remote(tuple(jobs)), "the scores of the evaluation")]
    return collect(condition.name, results, tuple(skipped), tuple(payloads), evicted, log_tokens)


def stream_request(config: RunConfig, task: StreamTask, condition: Condition, stage: str) -> RolloutTask:
    """One greedy stream over `task`; `stage` keeps its name apart from those of other evaluations."""
    return RolloutTask(
        group=f"{stage}:{condition.name}/{task.id}",
        epoch=0,
        task=task,
        streams=1,
        turns=config.data.turns_of(task),
        temperature=0.0,
        memory=condition.memory,
        empty_thoughts=condition.empty_thoughts,
    )


def failed_turns(config: RunConfig, task: StreamTask) -> tuple[tuple[ParsedTurn, ...], ...]:
    """What a stream that failed counts as: silence, it answered nothing."""
    return (silent_turns(config.data.turns_of(task)),)


def collect(
    name: str,
    results: list[RewardResult],
    skipped: tuple[SkippedSample, ...],
    payloads: tuple[Any, ...],
    evicted: int,
    log_tokens: int,
) -> EvalResult:
    by_category: dict[str, list[bool]] = {}
    for result in results:
        for answer in result.answers:
            by_category.setdefault(answer.category, []).append(answer.correct)
    every = [correct for values in by_category.values() for correct in values]
    return EvalResult(
        condition=name,
        n=len(every),
        reward=float(np.mean([r.total for r in results])),
        timing=float(np.mean([answer.timing for r in results for answer in r.answers])),
        accuracy={k: float(np.mean(v)) for k, v in sorted(by_category.items())} | {"all": float(np.mean(every))},
        skipped=skipped,
        payloads=payloads,
        evicted_tokens=evicted,
        log_tokens=log_tokens,
        by_category={k: len(v) for k, v in by_category.items()},
    )


def scripted_rewards(config: RunConfig, session: Session, tasks: tuple[StreamTask, ...]) -> tuple[float, float]:
    """(mean reward of a scripted oracle, of constant silence) over the tasks, through the run's own scorer."""
    means = []
    for script in ("oracle", "silent"):
        jobs = []
        for task in tasks:
            chunk, turns = config.data.video.chunk_seconds_of(task), config.data.turns_of(task)
            said = oracle_turns(task, chunk, turns) if script == "oracle" else silent_turns(turns)
            jobs.append(RewardJob(task.id, task, (said,), chunk))
        scores = session.call(session.scorer.score.remote(tuple(jobs)), f"the scores of the {script} script")
        means.append(float(np.mean([r[0].total for r in scores])))
    return means[0], means[1]


def chance(tasks: tuple[StreamTask, ...], category: str) -> float | None:
    """Share of the commonest answer of a category; None if it has no question."""
    answers = Counter(a.text for task in tasks if task.category == category for a in task.answers)
    total = sum(answers.values())
    return max(answers.values()) / total if total else None
