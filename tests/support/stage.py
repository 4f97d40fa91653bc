"""A stage's context without actors: the files that a loop writes are real, the session has only what is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from conf.schema import RunConfig
from runtime.context import StageContext, StageLength
from runtime.scoring.scorers import Scorers
from runtime.stop import StopSignal
from runtime.store.checkpoint import CheckpointState, Groups
from runtime.store.runlock import RunLock


class Told:
    """Takes the place of terminal and charts: `said` are the lines, `charted` the steps that the tracker was given."""

    run_id = "run"

    def __init__(self) -> None:
        self.said: list[str] = []
        self.charted: list[int] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def step(self, stage: str, done: int, total: int, values: dict[str, float | None]) -> None:
        self.said.append(f"{stage} {done}/{total}")

    def commit(self, lines: list[Any]) -> None:
        self.charted += [line.step for line in lines]


def named(*groups: str) -> Groups:
    """Groups as a stage without rows keeps them."""
    return Groups(names=groups)


def stage_context(
    config: RunConfig,
    stage: str,
    steps: int,
    *,
    resume: CheckpointState | None = None,
    **session: Any,
) -> tuple[StageContext, Told]:
    """Return a context under `config.root`, and what the stage tells through it."""
    told = Told()
    context = StageContext(
        stage=stage,
        length=StageLength(steps),
        config=config,
        session=SimpleNamespace(
            crew=SimpleNamespace(
                places=SimpleNamespace(workers=[], waiting=set(), loaded=set(), least=0, look=lambda: None),
                scorers=Scorers(config.reward, config.cluster, (), lambda place: None),
            ),
            config=config,
            book=SimpleNamespace(explain=str, name_of=lambda error: ""),
            **{"learners": SimpleNamespace(actors=[])} | session,
        ),
        tracker=told,
        progress=told,
        stop=StopSignal(),
        lock=RunLock(config.root),
        streaming={},
        settings={},
        resume=resume,
    )
    return context, told
