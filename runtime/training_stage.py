"""What every training stage has in common: the groups that are done, the journal, the checkpoints, the end.

Invariants:
* a group is in a checkpoint's `consumed` exactly if its weights have seen it, in `dropped` if it was given up by name;
* a step is in the journal before it is in the charts, and in the charts only once a checkpoint includes it;
* the loop never waits for a checkpoint, except at the stage's end (the learner: see `runtime.checkpointer`);
* a stage that is asked to stop leaves a checkpoint of its last step behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rollout.setup import WorkerSetup
from runtime.checkpointer import Checkpointer
from runtime.cluster.events import Events
from runtime.context import StageContext
from runtime.recovery.revival import Revival
from runtime.recovery.stacks import ask_everywhere
from runtime.recovery.watch import Watch
from runtime.stop import Requeue
from runtime.store.checkpoint import CheckpointState
from runtime.store.journal import StepJournal, journal_path
from runtime.task_order import Either, GroupSet, TaskOrder
from streams.task import StreamTask


class TrainingStage:
    """The state of one stage, restored from the checkpoint that it goes on from, and the events that it waits for."""

    def __init__(
        self, context: StageContext, tasks: Sequence[StreamTask], *, patience: int, group_size: int = 1
    ) -> None:
        """tasks: what the stage trains on. patience: groups dropped in a row before it gives up.

        group_size: streams of a group.
        """
        self.context = context
        self.revival = Revival(
            context.session,
            lambda *given: self.events.expect(*given, own_limit=True),
            lambda line: context.progress.say(f"{context.stage}: {line}"),
            lambda setup: _there(setup, self),
            context.deaths,
            context.suspects,
        )
        cluster = context.config.cluster
        session = context.session
        self._watch = Watch(
            session.crew.places,
            session.crew.scorers,
            cluster.hang_s,
            cluster.start_timeout_s,
            session.learners,
            lambda: ask_everywhere(session.book.log_folder),
        )
        self.events = Events(cluster.call_timeout_s, context.stop, self.revival.died, self._look)
        state = context.resume
        self.began_at = state.step if state else 0
        self._order = TaskOrder([task.id for task in tasks], context.config.seed)
        self.consumed = GroupSet.restore(self._order, state, "consumed")
        self.dropped = GroupSet.restore(self._order, state, "dropped")
        self.checkpoints = Checkpointer(context, self.events, self._completed, self.began_at if state else None)
        self.journal = StepJournal.open(journal_path(context.config.root, context.stage), self.began_at)
        self.revival.begin()
        self.patience = patience
        self._group_size = group_size
        self._seconds_before: float = state.counters.get("seconds", 0.0) if state else 0.0
        self._dropped_in_a_row = 0

    @property
    def done(self) -> Either:
        """The groups that the stage is through with."""
        return Either(self.consumed, self.dropped)

    @property
    def seconds(self) -> float:
        """Time of earlier attempts, up to the checkpoints that they were continued from, and of this one until now."""
        return self._seconds_before + self.context.seconds()

    @property
    def deaths(self) -> dict[str, int]:
        """Processes that were replaced, by the actor's name; in earlier runs, up to their checkpoints, and in this one."""
        return dict(self.context.deaths)

    # --- groups and steps -----------------------------------------------------------------------------------------

    def chart(self, step: int) -> None:
        """Hand the journal's lines up to `step`, which a checkpoint holds, to the tracker."""
        self.context.tracker.commit(self.journal.take(step))

    def trained(self, step: int, groups: tuple[str, ...], values: dict[str, float | None]) -> None:
        """Note an optimiser step: the groups it trained, and what is logged of it."""
        for group in groups:
            self.consumed.add(group)
        self.journal.append(step, values, groups)

    def drop(self, group: str, line: str, hopeless: str) -> None:
        """Give a group up, saying `line`. Raises RuntimeError(hopeless) once more than `patience` were dropped in a row."""
        self.dropped.add(group)
        self.context.progress.say(f"{self.context.stage}: {line}")
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row > self.patience:
            raise RuntimeError(hopeless)

    def found_good(self) -> None:
        """Note a group that can be trained: the count of groups dropped in a row starts again."""
        self._dropped_in_a_row = 0

    # --- checkpoints and the end ----------------------------------------------------------------------------------

    def save(self, step: int, counters: dict[str, Any], *, final: bool = False) -> None:
        """Have the checkpoint of `step` written, which is also the version of its weights. counters: the result so far."""
        self.checkpoints.save(self._state(step, counters), final=final)

    def _state(self, step: int, counters: dict[str, Any]) -> CheckpointState:
        return CheckpointState(
            self.context.stage,
            version=step,
            step=step,
            consumed=self.consumed.stored(),
            dropped=self.dropped.stored(),
            rows=self._order.rows,
            seed=self._order.seed,
            group_size=self._group_size,
            counters=counters,
        )

    def finish(self, step: int, counters: dict[str, Any]) -> None:
        """Write the stage's last checkpoint; wait for it, all before it, and workers that are being replaced and have room."""
        self.checkpoints.settle()
        self.save(step, counters, final=True)
        self.checkpoints.settle()
        while self.revival.coming:
            self.events.wait()

    def leave(self, step: int, counters: dict[str, Any]) -> NoReturn:
        """End as asked, between two steps: with a checkpoint of `step`, unless there is one. Raises Requeue."""
        if self.context.stop.loss and step:
            self.checkpoints.save_alone(self._state(step, counters))
        self.checkpoints.settle()
        if step and step not in self.checkpoints.written:
            self.save(step, counters)
            self.checkpoints.settle()
        raise Requeue(f"{self.context.stage}: stopped at step {step}, checkpoint {self.context.stop.last_checkpoint}")

    def completed(self, step: int) -> Collection[str]:
        """Act on the checkpoint of `step`, now complete. Returns the names of those that must outlive newer ones."""
        return ()

    def _look(self) -> None:
        self.context.session.crew.places.look()
        self._watch.look()
        self.revival.look()
        self.checkpoints.look()

    def _completed(self, step: int) -> Collection[str]:
        self.chart(step)
        return self.completed(step)


def _there(setup: WorkerSetup, stage: TrainingStage) -> WorkerSetup:
    """Return the setup with the stage's newest checkpoint, if the one that it began with has been deleted for others."""
    if Path(setup.checkpoint).is_dir():
        return setup
    export, step = stage.checkpoints.newest()
    return replace(setup, checkpoint=str(export), version=step)
