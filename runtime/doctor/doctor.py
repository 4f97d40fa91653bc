"""Checks whether the stages of a job could run, by what a real start does, up to where it would load a model.

Ray is joined or started, the actors are placed and begin, and each says what it would do; then all of them end. What a stage
would begin with, a stage before it may have yet to make: the model that the run begins with stands for it: its shape is that.

Invariants:
* all problems that can be found are told, not only the first;
* no lock is taken, nothing under run_root changes: what actors write goes into a folder aside, which is deleted;
* nothing is trained, charted, or deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from conf.age import age_bound
from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.checks import check_memory_policy, check_rows, content_of, describe, needed_splits
from runtime.cluster.session import Session
from runtime.doctor.findings import Findings
from runtime.doctor.kernels import kernel_lines
from runtime.planning.room import room_checks
from runtime.rows import RowUse
from runtime.run import Run, Stage
from runtime.starting_point import StartingPoint
from runtime.stop import StopSignal
from runtime.store.manifests import TRAINING, StagePlan, StageStore
from runtime.store.runlock import RunLock
from runtime.tracking import tracker
from streams.checkpoint.model_shape import ModelGeometry
from streams.data.dataset import TaskFile
from streams.data.synthetic.questions import MODES
from streams.task import ExpectedAnswer, StreamTask, TimedQuery

QUERY_BYTES = 100
"""More than a generated question has."""


def diagnose(config: RunConfig, overrides: list[str], stages: Mapping[str, Stage], stop: StopSignal) -> int:
    """Print a line for each check. Returns the exit status: 0 if a run would start, else 2."""
    findings = Findings()
    with _aside(config.root, findings) as aside:
        doctor = _Doctor(config, overrides, stages, findings)
        ready = doctor.look_at_settings()
        if aside is None or not ready:
            findings.leave_open("cluster, rows, room, devices, kernels", "the problems above come first")
        else:
            doctor.look_at_cluster(aside, stop)
    count = len(findings.problems)
    if count:
        print(f"this run would not start: {count} {'problem' if count == 1 else 'problems'}", flush=True)
        return 2
    print("this run would start", flush=True)
    return 0


@contextlib.contextmanager
def _aside(root: Path, findings: Findings) -> Iterator[Path | None]:
    """Make a folder within run_root, for the time of the checks; None, and a problem, if it cannot be made."""
    new = [folder for folder in (root, *root.parents) if not folder.exists()]

    made = findings.check("run_root", partial(_make_aside, root), lambda folder: f"{folder.parent} can be written")
    try:
        yield made
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):  # a run has begun there meanwhile
                for folder in new:
                    folder.rmdir()


def _make_aside(root: Path) -> Path:
    """Raises ValueError or OSError for a run_root that cannot be written."""
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"run_root={root}: {existing} is a file: name a folder, new or of an earlier run")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"run_root={root}: {existing} cannot be written: choose another, or mend its permissions")
    root.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".doctor-", dir=root.resolve()))


class _Doctor:
    """config: as it was given; what a checkpoint says is in force once it is read."""

    def __init__(
        self, config: RunConfig, overrides: list[str], stages: Mapping[str, Stage], findings: Findings
    ) -> None:
        self.config, self._overrides, self._stages, self._findings = config, overrides, stages, findings
        self.start = StartingPoint.of(config)
        self._rows: dict[str, TaskFile | None] = {}
        self._devices_checked = False
        self._store = StageStore(config.root.resolve(), config, findings.heard.say)

    # --- before any process starts --------------------------------------------------------------------------------

    def look_at_settings(self) -> bool:
        """Check what needs no actor. Returns whether the rest can be checked."""
        check, before = self._findings.check, len(self._findings.problems)
        check("age bound", partial(age_bound, self.config), lambda age: str(age.bound))
        for split in needed_splits(self.config):
            check(f"data.{split}", partial(self._read, split), _rows_in_words)
        check("checkpoints", self._checkpoints)
        check("memory policy", self._memory_policy)
        for name in self.config.job.stages:
            check(f"settings of {name}", partial(self._settings_of, name))
        if check("use of run_root", self._in_use) is None:
            self._findings.leave_open("stages", "a run that goes on changes them")
        else:
            check("stages", self._planned)
        reached, where = tracker.look(self.config.tracking, self.config.root)
        check("MLflow", lambda: where if reached else f"warning: {where}")
        return len(self._findings.problems) == before

    def _read(self, split: str) -> TaskFile | None:
        self._rows[split] = None
        self._rows[split] = check_rows(self.config, split)
        return self._rows[split]

    def _checkpoints(self) -> str:
        self.start.check()
        self.config = self.start.respected(self._overrides, self._findings.heard.say, self._findings.heard.say)
        named = ", ".join(f"{key}={value}" for key, value in self.start.named)
        return named or "none is named: a small model with random weights is made"

    def _memory_policy(self) -> str:
        check_memory_policy(self.config, self.start)
        return self.config.memory.words

    def _settings_of(self, name: str) -> str:
        self._stages[name].check(self.config, self._rows)
        return "can be used"

    def _in_use(self) -> str:
        left = RunLock(self.config.root.resolve()).look()
        return f"by nobody; {left} ended without saying so" if left else "by nobody"

    def _planned(self) -> str:
        root, said = self.config.root.resolve(), self._findings.heard.say
        self._store = StageStore(root, self.config, said, content_of(self._rows))
        plans = self._store.plan()
        self.start.check_nothing_needed_is_replaced(plans)
        self.start.check_cold_start(plans)
        return ", ".join(f"{name} {_planned(plans.get(name))}" for name in self.config.job.stages)

    # --- with the actors ------------------------------------------------------------------------------------------

    def look_at_cluster(self, aside: Path, stop: StopSignal) -> None:
        """Place the actors, let them begin, and check what they and the machine can hold."""
        made = self._findings.check("placement", lambda: self._placed(aside, stop), _placed_in_words)
        if made is None:
            self._findings.leave_open("rows, room, devices, kernels", "they need the actors")
            return
        run = made
        try:
            if run.session is None:
                return
            ready = self._findings.check("actors", run.ready_session, _begun)
            if ready is not None:
                self._look_at_stages(run)
        finally:
            run.tracker.close()
            if run.session is not None:
                run.session.close()

    def _placed(self, aside: Path, stop: StopSignal) -> Run:
        lock = RunLock(self.config.root.resolve())
        run = Run(
            self.config,
            self.start,
            self._stages,
            self._store,
            self._findings.heard,
            lock,
            stop,
            aside=aside,
            read=self._rows,
        )
        said = {*describe(self.config, self.start)}
        self._findings.heard.lines = [line for line in self._findings.heard.lines if line not in said]
        return run

    def _look_at_stages(self, run: Run) -> None:
        """Check the stages that are not finished, in their order."""
        begins: tuple[Path, ...] = ()
        trains = False
        for name, stage in run.stages.items():
            plan = run.store.plans.get(name)
            if not stage.actors or (plan is not None and plan.skip):
                continue
            uses = [use for use in stage.uses(run.config) if use.name == name]
            makes_own = any(use.own_checkpoint(run.config) for use in uses)
            if not trains or makes_own or not begins:
                ask = partial(_begins, run, stage, plan)
                begins = self._findings.check(f"model of {name}", ask, _listed) or ()
            trains = trains or name in TRAINING
            if not begins:
                self._findings.leave_open(f"rows and room of {name}", "they need the model")
                continue
            self._look_at_stage(run, name, stage, begins)

    def _look_at_stage(self, run: Run, name: str, stage: Stage, begins: tuple[Path, ...]) -> None:
        check = self._findings.check
        shapes = [check(f"weights of {name}", partial(run.geometry, folder), _size) for folder in begins]
        geometry = shapes[0]
        if geometry is None:
            self._findings.leave_open(f"rows and room of {name}", "they need the model's shape")
            return
        tasks: Sequence[StreamTask] = ()
        for use in stage.uses(run.config):
            if use.name == name:
                tasks = check(f"rows of {name}", partial(self._usable, run, use, begins[0]), _count) or ()
        learner = stage.learner(run.config)
        if name in TRAINING and learner is not None and tasks and run.session is not None:
            room = room_checks(run.config, run.root, geometry, learner, name, tasks, run.session.stores)
            for what, ask in room.items():
                check(f"{what} of {name}", ask, "\n".join)
        if not self._devices_checked:
            self._devices_checked = True
            check("devices", partial(_devices, run, geometry))
        check(f"kernels of {name}", partial(_kernels, run, learner, geometry), "\n".join)

    def _usable(self, run: Run, use: RowUse, checkpoint: Path) -> Sequence[StreamTask]:
        """Return the rows that a stage can use; of rows that are yet to be generated, one as long as they may get."""
        data = run.store.plans.get("data")
        if self._rows.get(use.split) is None and data is not None and not data.skip:
            for split, rows in self._rows.items():
                if rows is None:
                    run.files.expect(split, *_to_come(run.config, split))
            self._findings.heard.say("yet to be generated by stage data: planned as if all were as long as the longest")
            return run.files.file(use.split).tasks
        run.judge_rows(use.name, checkpoint)
        return run.files.usable(use)


def _rows_in_words(rows: TaskFile | None) -> str:
    return "yet to be generated by stage data" if rows is None else f"{len(rows.tasks)} rows can be read"


def _planned(plan: StagePlan | None) -> str:
    if plan is None:
        return "runs"
    if plan.skip:
        return "is finished"
    return f"goes on from {plan.resume.path}" if plan.resume else "begins"


def _placed_in_words(run: Run) -> str:
    if run.session is None:
        return "no stage needs an actor"
    return "; ".join(f"node {store.node}: {', '.join(store.actors)}" for store in run.session.stores)


def _begun(session: Session) -> str:
    there, wanted = len(session.crew.places.here), len(session.crew.places.workers)
    if there == wanted:
        return "all of them have begun"
    return f"warning: {there} of {wanted} rollout workers have begun: no node has room for the others, which join when one has"


def _begins(run: Run, stage: Stage, plan: StagePlan | None) -> tuple[Path, ...]:
    return (plan.resume.path / "hf",) if plan is not None and plan.resume else stage.begins(run)


def _devices(run: Run, geometry: ModelGeometry) -> str:
    run.plan_devices(geometry)
    return "the estimates of all stages fit"


def _listed(paths: tuple[Path, ...]) -> str:
    return ", ".join(map(str, paths))


def _size(geometry: ModelGeometry) -> str:
    return f"{geometry.family.model_type}, {geometry.total:,} parameters"


def _count(tasks: Sequence[StreamTask]) -> str:
    return f"{len(tasks)} can be used"


def _to_come(config: RunConfig, split: str) -> tuple[StreamTask, int]:
    """Return the longest row that the generator may make for a split, and how many it makes."""
    synthetic = config.data.synthetic
    count = synthetic.train_clips if split == "train" else len(MODES) * synthetic.heldout_per_mode
    length = synthetic.max_turns * synthetic.chunk_seconds
    # A stream ends soon after its last answer.
    query, answer = TimedQuery(0.0, "?" * QUERY_BYTES), ExpectedAnswer(length - synthetic.chunk_seconds / 2, "!")
    return StreamTask("to come", "", 0.0, length, (query,), (answer,)), count


def _kernels(run: Run, learner: LearnerConfig | None, geometry: ModelGeometry) -> list[str]:
    return kernel_lines(run.ready_session(), run.config, learner, geometry.head_dim)
