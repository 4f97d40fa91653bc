"""One invocation: the stages of a job in one Ray session, each skipped, continued or started as the plan says.

Invariants:
* a run knows no stage by what it does: `launch.py` lists the stages;
* a stage is marked finished only when everything it made is on disk;
* nothing is deleted before the actors have been placed;
* whatever ends the run, the tracker is told and the session is closed;
* a session whose Ray is lost is not closed, which would wait for Ray: its processes are ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from conf.schema import RunConfig
from conf.streaming import streaming_settings
from learner.config import LearnerConfig
from learner.setup import LearnerSetup
from rollout.setup import SelfCheckSetup, WorkerSetup
from runtime.checks import Rows, describe
from runtime.cluster.session import Session
from runtime.context import StageContext, StageLength
from runtime.mismatch_gate import MismatchGate
from runtime.planning.device_plan import DevicePlan, plan_devices
from runtime.planning.footprint import gib
from runtime.planning.room import room_checks
from runtime.planning.usage import usage_lines, usage_report, write_usage
from runtime.recovery.lifeline import RayGuard
from runtime.recovery.restarts import LEARNER, LearnerLoss, Restarts, learner_loss, words_of
from runtime.recovery.stacks import ask_everywhere, end_here
from runtime.rows import RowUse
from runtime.starting_point import StartingPoint
from runtime.stop import Requeue, StopSignal
from runtime.store.journal import journal_path, read_lines
from runtime.store.manifests import TRAINING, StageStore, clear, flat, plain
from runtime.store.runlock import RunLock
from runtime.task_files import TaskFiles
from runtime.tracking.progress import Progress
from runtime.tracking.spilling import SpillWatch
from runtime.tracking.tracker import Tracker
from streams.backbone.boundary import Boundary
from streams.checkpoint.folder import resolve_checkpoint
from streams.checkpoint.model_shape import ModelGeometry
from streams.checkpoint.weights import check_weights
from streams.log.mismatch import LogpDiff
from streams.task import StreamTask


def _no_rows(config: RunConfig) -> tuple[RowUse, ...]:
    return ()


def _no_learner(config: RunConfig) -> LearnerConfig | None:
    return None


def _no_checkpoints(run: Run) -> tuple[Path, ...]:
    return ()


def _nothing_to_check(config: RunConfig, rows: Rows) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """A stage, as `launch.py` lists it.

    Attributes:
        run: does the stage's work. What it returns is kept in the stage's manifest.
        actors: whether it needs rollout workers, scorers and learners.
        uses: what it does with the rows of the task files.
        learner: the settings of the learner that it sets up; None where it sets up none. Devices are planned by them.
        check: raises ValueError for settings under which the stage could only fail, before any actor starts.
        begins: returns the checkpoints that it would load if it began now, the one that it starts from first; () if none.
    """

    run: Callable[[Run], dict[str, Any] | None]
    actors: bool = True
    uses: Callable[[RunConfig], tuple[RowUse, ...]] = _no_rows
    learner: Callable[[RunConfig], LearnerConfig | None] = _no_learner
    check: Callable[[RunConfig, Rows], None] = _nothing_to_check
    begins: Callable[[Run], tuple[Path, ...]] = _no_checkpoints


class Run:
    """The stages share the session, the tracker and the clock. `store` holds the plan of every stage."""

    def __init__(
        self,
        config: RunConfig,
        start: StartingPoint,
        stages: Mapping[str, Stage],
        store: StageStore,
        progress: Progress,
        lock: RunLock,
        stop: StopSignal,
        *,
        aside: Path | None = None,
        read: Rows | None = None,
    ) -> None:
        """read: the task files that have been read.

        aside: a folder for what the actors write, of a run that only checks: it tracks nothing, and deletes nothing.
        """
        self.config, self.store, self.progress, self.lock, self.stop = config, store, progress, lock, stop
        self.start = start
        self.stages = {name: stages[name] for name in config.job.stages}
        self.root = config.root.resolve()
        self._written = aside or self.root
        self.began = time.monotonic()
        self.gate = MismatchGate(config)
        self.files = TaskFiles(config, progress.say, read or {})
        self.restarts = Restarts(config.cluster)
        self._introduced = False
        self._guard = RayGuard(stop)
        self._plan: DevicePlan | None = None
        self._checked: set[Path] = set()
        self.root.mkdir(parents=True, exist_ok=True)
        for line in [*describe(config, start), *config.notes()]:
            progress.say(line)
        plans = store.plans
        training = any(stage in TRAINING for stage in plans)
        resumed = [plan.resume for plan in plans.values() if plan.resume]
        self.tracker = Tracker(
            replace(config.tracking, enabled=config.tracking.enabled and not aside),
            self.root,
            f"{config.job.name}-seed{config.seed}",
            resume=training and config.resume != "never" and store.charts_go_on,
            remember=training,
            known=next((found.state.tracking_run for found in resumed if self.root in found.path.parents), ""),
        )
        self.tracker.params(flat(asdict(config)))
        try:
            # Actors import while the driver makes the data.
            needs_actors = any(stage.actors for stage in self.stages.values())
            placed = replace(config, run_root=str(self._written)) if aside else config
            self.session = Session(placed, self._guard) if needs_actors else None
            # Only now: a run that cannot start must not delete the results of an earlier one.
            if aside is None:
                clear(self.root, [s for s in config.job.stages if s not in plans or plans[s].fresh])
        except BaseException:
            self._guard.close()
            self.tracker.close("FAILED")
            raise

    def run(self) -> None:
        """Run every stage. Raises runtime.stop.Requeue if the run was asked to stop."""
        status = "FAILED"
        spills = None if self.session is None else SpillWatch()
        try:
            for stage, does in self.stages.items():
                plan = self.store.plans.get(stage)
                if self.stop.requested:
                    raise Requeue(f"stopped before stage {stage} began")
                if plan is not None and plan.skip:
                    self.store.adopt(stage)
                    # Its last steps may have been lost in the tracker's queue; the journal has them all.
                    self.tracker.commit(read_lines(journal_path(self.root, stage)))
                    self.progress.say(f"{stage}: finished before, skipped (resume={self.config.resume})")
                    continue
                if plan is not None:
                    self.store.begin(stage)
                result = self._attempts(stage, does)
                if plan is not None:
                    self.store.finish(stage, plain(result))
            status = "FINISHED"
        except Requeue:
            status = "FAILED" if self.stop.loss else "KILLED"
            raise
        except TimeoutError:
            if self.session is not None:
                self.progress.say(ask_everywhere(self.session.book.log_folder))
            raise
        finally:
            self._guard.close()
            if spills is not None:
                spills.close()
                if spills.spilled:
                    self.progress.say(
                        f"object store: up to {gib(spills.spilled)} lay on disk at once, for want of room"
                    )
            self.tracker.close(status)
            if self.session is not None and self.stop.loss:
                end_here(self.session.book.log_folder)
            elif self.session is not None:
                self.session.close()

    def _attempts(self, stage: str, does: Stage) -> dict[str, Any] | None:
        """Run a stage, again with new processes where it loses its learner. Returns its result."""
        while True:
            try:
                return does.run(self)
            except OSError as error:
                self._guard.judge(stage, error)
                raise
            except (RuntimeError, RayError) as error:
                self._guard.judge(stage, error)
                loss = None if self.session is None else learner_loss(error, self.session)
                if loss is None:
                    raise
                if self.stop.requested:
                    self.restarts.settle_saves(self.config.checkpoint.grace_s)
                    raise Requeue(f"{stage}: stopped, and {words_of(loss)}") from error
                self._begin_again(stage, loss, error)

    def _begin_again(self, stage: str, loss: LearnerLoss, error: Exception) -> None:
        """Start new processes, and plan the stage anew from what is on disk. Raises RuntimeError if it may not go on."""
        which = self.restarts.allow(stage, _reached(self.store, stage), loss, error)
        self.progress.say(f"{stage}: {words_of(loss)}; new processes go on from the newest checkpoint ({which})")
        assert self.session is not None
        self.session.restart()
        self._introduced = False
        self.restarts.settle_saves(self.config.checkpoint.deadline_s)
        if stage in TRAINING:
            found = self.store.plans[stage].resume
            self.restarts.deaths(stage, found.state if found else None)[LEARNER] += 1
            if self.store.again(stage).fresh:
                clear(self.root, [stage])
            self.store.begin(stage)

    # --- what the stages share --------------------------------------------------------------------------------

    def ahead(self) -> list[Stage]:
        """Return the stages of this job that are not finished."""
        plans = self.store.plans
        return [stage for name, stage in self.stages.items() if name not in plans or not plans[name].skip]

    def judge_rows(self, stage: str, checkpoint: Path) -> None:
        """Name the rows that cannot be answered, for this stage and for those to come."""
        uses = {use.name: use for ahead in self.ahead() for use in ahead.uses(self.config)}
        self.files.judge(stage, tuple(uses.values()), self.ready_session(), checkpoint)

    def start_from(self, use: RowUse, start: Callable[[], Path]) -> tuple[Path, Sequence[StreamTask]]:
        """Return the checkpoint that a training stage continues or starts from, and the rows that it can use."""
        found = self.store.plans[use.name].resume
        self.files.tasks(use.split)
        checkpoint = found.path / "hf" if found else start()
        self.judge_rows(use.name, checkpoint)
        return checkpoint, self.files.usable(use)

    def prepare(
        self,
        stage: str,
        checkpoint: Path,
        learner: LearnerConfig,
        steps: int,
        tasks: Sequence[StreamTask],
        *,
        reference: Path | None = None,
    ) -> StageContext:
        """Load the actors with the checkpoint that a training stage continues or starts from; return its context.

        steps: optimiser steps of the whole stage. reference: the frozen policy of the KL term.
        Raises ValueError if disk, caches or devices are too small, before anything is loaded.
        """
        found = self.store.plans[stage].resume
        geometry = self.geometry(checkpoint)
        if reference is not None:
            self.geometry(reference)
        assert self.session is not None
        room = room_checks(self.config, self.root, geometry, learner, stage, tasks, self.session.stores)
        for check in room.values():
            for line in check():
                self.progress.say(line)
        session = self.ready_session()
        self.plan_devices(geometry)
        version = found.state.version if found else 0
        infos = session.crew.set_up(self.worker_setup(checkpoint, learner.boundary, version))
        setup = self.learner_setup(checkpoint, learner, steps)
        trained = session.setup_learner(replace(setup, version=version, reference=str(reference or "")))
        if found and found.resumable:
            session.call(session.learners.load(str(found.path)), f"the learner to load {found.path}")
        if found:
            self.store.settle(stage)
            self.stop.last_checkpoint = str(found.path)
        self.progress.say(
            f"{stage}: {infos[0].kv_slots} KV slots on each worker, attention {infos[0].attention}; {trained:,} of "
            f"{infos[0].parameters:,} parameters train (freeze={', '.join([learner.freeze, *learner.freeze_names])})"
        )
        return StageContext(
            stage=stage,
            length=StageLength(steps),
            config=self.config,
            session=session,
            tracker=self.tracker,
            progress=self.progress,
            stop=self.stop,
            streaming=streaming_settings(self.config),
            settings=self.store.settings(stage),
            resume=found.state if found else None,
            resumed=found.path if found else None,
            lock=self.lock,
            deaths=self.restarts.deaths(stage, found.state if found else None),
            suspects=self.restarts.suspects(stage),
            saves=self.restarts.saves,
        )

    def geometry(self, checkpoint: Path) -> ModelGeometry:
        """Return the shape of a model that actors are about to load, after checking that all its weights are there.

        Raises ValueError if they are not. Warnings about the folder are printed once.
        """
        geometry = ModelGeometry.read(checkpoint)
        if checkpoint not in self._checked:
            self._checked.add(checkpoint)
            for warning in check_weights(checkpoint).warnings:
                self.progress.say(f"warning: {warning}")
        return geometry

    def plan_devices(self, geometry: ModelGeometry) -> None:
        """Before anything is loaded, once: sizes the KV pools for all stages to come. Raises ValueError if they cannot fit."""
        if self._plan is not None:
            return
        ahead = {name: stage for name, stage in self.stages.items() if stage in self.ahead()}
        learners = {name: settings for name, stage in ahead.items() if (settings := stage.learner(self.config))}
        splits = dict.fromkeys(use.split for stage in ahead.values() for use in stage.uses(self.config))
        devices = self.ready_session().devices()
        tasks = chain.from_iterable(self.files.file(split).tasks for split in splits)
        self._plan = plan_devices(self.config, learners, geometry, tasks, devices)
        for line in self._plan.lines:
            self.progress.say(line)

    def report_usage(self, stage: str, by_kind: dict[str, LogpDiff] | None = None) -> None:
        """Print where time and memory went, and write it to run_root/usage.json."""
        assert self._plan is not None
        report = usage_report(self.ready_session().usage(), self._plan, by_kind or {})
        for line in usage_lines(report):
            self.progress.say(line)
        self.tracker.artifact(write_usage(self.root, stage, report))

    def ready_session(self) -> Session:
        assert self.session is not None
        pids = self.session.wait_ready()
        if not self._introduced:
            named = ", ".join(f"{name} {pid}" for name, pid in pids.items())
            self.progress.say(f"actors ready after {time.monotonic() - self.began:.0f} s (pids: {named})")
            self._introduced = True
        return self.session

    def initial_model(self) -> Path:
        if self.config.model.path:
            return resolve_checkpoint(self.config.model.path)
        model = self.config.model
        return self.ready_session().build_tiny(self._written / "model", model.tiny, self.config.seed, model.dtype)

    def worker_setup(self, checkpoint: Path, boundary: Boundary, version: int = 0) -> WorkerSetup:
        config = self.config
        assert self._plan is not None
        return WorkerSetup(
            checkpoint=str(checkpoint),
            dtype=config.model.dtype,
            layout=config.layout,
            memory=config.memory,
            video=config.data.video,
            rollout=config.rollout,
            boundary=boundary,
            kv_slots=self._plan.kv_slots,
            run_seed=config.seed,
            self_check=SelfCheckSetup(
                every=config.monitor.every,
                outlier_above=self.gate.limits.token,
                attention=config.learner.attention,
            ),
            version=version,
            staging=self._plan.staging,
            vision_attention=config.model.vision_attention,
            fused_kernels=config.model.fused_kernels,
        )

    def learner_setup(self, checkpoint: Path, learner: LearnerConfig, steps: int) -> LearnerSetup:
        assert self._plan is not None
        return LearnerSetup(
            checkpoint=str(checkpoint),
            layout=self.config.layout,
            learner=self._plan.settled(learner),
            total_steps=steps,
            seed=self.config.seed,
            outlier_above=self.gate.limits.token,
            vision_attention=self.config.model.vision_attention,
            fused_kernels=self.config.model.fused_kernels,
        )


def _reached(store: StageStore, stage: str) -> int:
    """Return the last step that this run has made of a stage, or that it goes on from."""
    plan = store.plans.get(stage)
    if plan is None or stage not in TRAINING:
        return 0
    if plan.resume is not None and stage not in store.settled:
        return plan.step  # the journal is still that of an earlier run
    lines = read_lines(journal_path(store.root, stage))
    return max((line.step for line in lines if line.kind == "step"), default=plan.step)
