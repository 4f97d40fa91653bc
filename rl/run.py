"""One invocation: the stages of a job in one Ray session, each skipped, continued or started as the plan says.

Owner: rl. Invariants: a stage is marked finished only when everything it made is on disk; nothing is deleted before the
actors run; whatever ends the run, the tracker hears of it and the session is closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from conf.streaming import streaming_settings
from evals.job import run_evaluation
from evals.summary import (
    checkpoint_label,
    print_table,
    rows_fields,
    samples,
    stages_behind,
    training_fields,
    write_json,
)
from learner.config import LearnerConfig
from rl.checks import cold_start, describe, own_checkpoints, reference_of_branch
from rl.cluster import Session
from rl.disk import check_disk, checkpoint_size
from rl.features import check_features
from rl.fit import MemoryPlan, plan_run
from rl.journal import journal_path, read_lines
from rl.loop import RLLoop
from rl.monitor import Monitor
from rl.results import RLResult
from rl.rows import ORACLE_SECONDS, JudgedRows, judge_rows, play_oracle, tell_oracle, tell_overlap, tell_rows
from rl.runlock import RunLock
from rl.stage import StageContext
from rl.stages import TRAINING, StageStore, clear, flat, plain
from rl.stop import Requeue, StopSignal
from rl.tracking import Progress, Tracker
from rl.usage import usage_lines, usage_report, write_usage
from sft.loop import SftLoop, SftResult
from streams.dataset import SkippedSample, TaskFile, counted, load_tasks
from streams.geometry import ModelGeometry
from streams.messages import DeviceInfo, LearnerSetup, WorkerSetup
from streams.pretrained import resolve_checkpoint
from streams.scoring.stats import LogpDiff
from streams.synthetic import generate
from streams.task import StreamTask
from streams.terminal import one_line
from streams.weights import check_weights


class Run:
    """The stages share the session, the tracker and the clock. `store` holds the plan of every stage."""

    def __init__(
        self, config: RunConfig, store: StageStore, progress: Progress, lock: RunLock, stop: StopSignal
    ) -> None:
        self.config, self.store, self.progress, self.lock, self.stop = config, store, progress, lock, stop
        self.root = config.root.resolve()
        self.began = time.monotonic()
        self.monitor = Monitor(config)
        self.skipped: list[SkippedSample] = []
        self.bad_rows: dict[str, list[SkippedSample]] = {}
        self.rows: dict[str, JudgedRows] = {}
        self._introduced = False
        self._memory: MemoryPlan | None = None
        self._devices: list[DeviceInfo] = []
        self._splits: dict[str, TaskFile] = {}
        self._checked: set[Path] = set()
        self.root.mkdir(parents=True, exist_ok=True)
        for line in [*describe(config), *config.notes()]:
            progress.say(line)
        plans = store.plans
        training = any(stage in TRAINING for stage in plans)
        resumed = [plan.resume for plan in plans.values() if plan.resume]
        self.tracker = Tracker(
            config.tracking,
            self.root,
            f"{config.job.name}-seed{config.seed}",
            resume=training and config.resume != "never" and store.charts_go_on,
            remember=training,
            known=next((found.state.tracking_run for found in resumed if self.root in found.path.parents), ""),
        )
        self.tracker.params(flat(asdict(config)))
        try:
            # Actors import while the driver makes the data.
            needs_actors = bool(set(config.job.stages) - {"data"})
            self.session = Session(config, connecting=self.stop.lent()) if needs_actors else None
            # Only now: a run that cannot start must not cost the results of the one before.
            clear(self.root, [s for s in config.job.stages if s not in plans or plans[s].fresh])
        except BaseException:
            self.tracker.close("FAILED")
            raise

    def run(self) -> None:
        """Run every stage. Raises rl.stop.Requeue if the run was asked to stop."""
        status = "FAILED"
        try:
            for stage in self.config.job.stages:
                plan = self.store.plans.get(stage)
                if self.stop.requested:
                    raise Requeue(f"stopped before stage {stage} began")
                if plan is not None and plan.skip:
                    self.store.adopt(stage)
                    # Its last steps may have died in the tracker's queue: the journal has them all.
                    self.tracker.commit(read_lines(journal_path(self.root, stage)))
                    self.progress.say(f"{stage}: finished before, skipped (resume={self.config.resume})")
                    continue
                if plan is not None:
                    self.store.begin(stage)
                result = getattr(self, f"stage_{stage}")()
                if plan is not None:
                    self.store.finish(stage, plain(result))
            status = "FINISHED"
        except Requeue:
            status = "KILLED"
            raise
        finally:
            self.tracker.close(status)
            if self.session is not None:
                self.session.close()

    def stage_data(self) -> dict[str, Any]:
        """Generate the quickstart's clips, unless the data are the user's own."""
        if self.config.data.train:
            self.progress.say(f"data: using {self.config.data.train} and {self.config.data.heldout}")
            return {}
        began = time.monotonic()
        made = generate(self.root / "data", self.config.data.synthetic)
        self.progress.say(f"data: {made.train_jsonl} and {made.heldout_jsonl} in {time.monotonic() - began:.1f} s")
        return {"train": str(made.train_jsonl), "heldout": str(made.heldout_jsonl)}

    def stage_sft(self) -> dict[str, Any]:
        checkpoint, tasks = self._start_from("sft", self._initial_model)
        steps = self.config.sft_steps(len(tasks))
        loop = SftLoop(self._prepare_stage("sft", checkpoint, self.config.sft_learner(steps), steps, tasks), tasks)
        with self.stop.deferred():
            result = loop.run()
        self._report_usage("sft")
        self._note_rows("sft", result)
        self.progress.say(
            f"sft: {result.steps} steps in {result.seconds:.0f} s, loss {result.first_loss:.3f} -> {result.last_loss:.3f}"
        )
        return asdict(result) | {"kept": [asdict(sample) for sample in self.rows["sft"].kept]}

    def stage_rl(self) -> dict[str, Any]:
        checkpoint, tasks = self._start_from("rl", self._rl_start)
        steps = self.config.rl_steps(len(tasks))
        context = self._prepare_stage("rl", checkpoint, self.config.rl_learner(steps), steps, tasks)
        loop = RLLoop(context, tasks, self._tasks("heldout") if self.config.eval.every else ())
        with self.stop.deferred():
            result = loop.run()
        self._report_usage("rl", result.published_by_kind)
        self._note_rows("rl", result)
        self.progress.say(
            f"rl: {result.steps} steps in {result.seconds:.0f} s, mean reward {_shown(result.mean_reward_first)} -> "
            f"{_shown(result.mean_reward_last)}, ages up to {result.max_age} (bound {loop.buffer.limits.bound})"
        )
        self.monitor.judge("learner, on the published weights", result.published, loop.published_off)
        return asdict(result) | {"kept": [asdict(sample) for sample in self.rows["rl"].kept]}

    def stage_eval(self) -> None:
        session = self._ready_session()
        checkpoints = self._eval_checkpoints()
        geometries = [self._geometry(checkpoint) for checkpoint in checkpoints.values()]
        tasks = self._tasks("heldout")
        self._judge_rows("eval", next(iter(checkpoints.values())))
        self._plan_memory(geometries[0])
        summary, report = run_evaluation(
            self.config,
            session,
            tasks,
            checkpoints,
            self._worker_setup,
            lambda checkpoint: self._learner_setup(checkpoint, self.config.learner, 1),
            self.tracker,
            self.progress,
            self.rows["eval"].fits,
        )
        summary["wall_s"] = time.monotonic() - self.began
        summary = self._finish_summary(summary, stages_behind(self.root, checkpoints.values()))
        self.progress.say(f"summary: {self.root / 'summary.json'}")
        if self.tracker.enabled:
            served = self.tracker.uri.startswith("http")
            how = self.tracker.uri if served else f".venv/bin/mlflow ui --backend-store-uri {self.tracker.uri}"
            self.progress.say(f"metrics: {how}")
        if report is not None:
            self.monitor.judge("learner, on held-out logs", report.diff, report.off)

    def _finish_summary(self, summary: dict[str, Any], stages: tuple[str, ...]) -> dict[str, Any]:
        """Add what the run's own `stages` behind the evaluated checkpoints measured, and every sample left out or kept though
        it cannot be answered in full.
        """
        results = [self.store.result(stage) for stage in stages]
        skipped = [*self.skipped, *samples(summary.pop("skipped_heldout"))]
        kept = [sample for rows in self.rows.values() for sample in rows.kept]
        for result in results:
            skipped += samples(result.get("skipped", []))
            kept += samples(result.get("kept", []))
        summary = {
            "seed": self.config.seed,
            **summary,
            **rows_fields(skipped, kept),
            **training_fields(self.store.result("rl") if "rl" in stages else {}),
            "attempts": {stage: self.store.read(stage).get("attempts") for stage in stages},
        }
        write_json(self.root / "summary.json", summary)
        self.tracker.artifact(self.root / "summary.json")
        print_table(self.progress.console, summary)
        return summary

    # --- what the stages share --------------------------------------------------------------------------------

    def _start_from(self, stage: str, start: Callable[[], Path]) -> tuple[Path, tuple[StreamTask, ...]]:
        """The checkpoint that a training stage goes on from, or else starts from; and the rows that it can use."""
        found = self.store.plans[stage].resume
        self._tasks("train")
        checkpoint = found.path / "hf" if found else start()
        self._judge_rows(stage, checkpoint)
        tasks = self.rows[stage].tasks
        if not tasks:
            first = self.rows[stage].skipped[0]
            raise ValueError(
                f"{stage}: data.train holds no row that can be used under these settings (named above), for example "
                f"{first.source}: {first.reason}"
            )
        return checkpoint, tasks

    def _judge_rows(self, stage: str, checkpoint: Path) -> None:
        """Name the rows that cannot be answered: of this stage and, as early as they can be known, of those to come."""
        config, say = self.config, self.progress.say
        ahead = [name for name in TRAINING if name in self.store.plans and not self.store.plans[name].skip]
        if "eval" in config.job.stages or ("rl" in ahead and config.eval.every):
            ahead.append("eval")
        # One that starts from a checkpoint of its own may have another tokenizer: it is judged when it starts.
        own = {"rl": config.algorithm.init != "auto", "eval": config.eval.checkpoint not in ("auto", "best")}
        new = [name for name in ahead if name not in self.rows and (name == stage or not own.get(name))]
        session = self._ready_session() if new else None
        for name in new:
            assert session is not None
            split = "heldout" if name == "eval" else "train"
            tasks = self._loaded(split).tasks
            judged = self.rows[name] = judge_rows(config, session, tasks, checkpoint, name)
            tell_rows(say, f"{name}: {split}", judged)
            if name != "sft" and judged.tasks:
                report = play_oracle(config, session, judged.tasks, judged.fits, ORACLE_SECONDS)
                tell_oracle(say, f"{name}: {split}", report, judged)
            if name == "eval" and len(ahead) > 1:
                tell_overlap(say, self._loaded("train").tasks, tasks)

    def _note_rows(self, stage: str, result: SftResult | RLResult) -> None:
        """Put the rows that were left out before the stage in front of the samples that it skipped."""
        result.skipped = [*self.rows[stage].skipped, *result.skipped]
        self.skipped += result.skipped
        result.skipped = [*self.bad_rows["train"], *result.skipped]
        if result.skipped:
            counts = ", ".join(f"{kind} {count}" for kind, count in counted(result.skipped).items())
            self.progress.say(f"{stage}: left out, by reason: {counts} (all of them: stages/{stage}.json)")

    def _prepare_stage(
        self, stage: str, checkpoint: Path, learner: LearnerConfig, steps: int, tasks: tuple[StreamTask, ...]
    ) -> StageContext:
        """Actors loaded with where the stage stands: its starting checkpoint, or the one it goes on from."""
        found = self.store.plans[stage].resume
        geometry = self._geometry(checkpoint)
        reference = str(self._reference()) if stage == "rl" and self.config.algorithm.kl_coef else ""
        if reference:
            self._geometry(Path(reference))
        size = checkpoint_size(geometry, learner)
        self.progress.say(
            check_disk(self.root, size, self.config.checkpoint, best=bool(self.config.eval.every), stage=stage)
        )
        turns = max((self.config.data.turns_of(task) for task in tasks), default=1)
        self.progress.say(check_features(self.config, geometry, stage, turns))
        session = self._ready_session()
        self._plan_memory(geometry)
        version = found.state.version if found else 0
        infos = session.setup_workers(self._worker_setup(checkpoint, learner.freeze, version))
        setup = self._learner_setup(checkpoint, learner, steps)
        trained = session.setup_learner(replace(setup, version=version, reference=reference))
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
            steps=steps,
            config=self.config,
            session=session,
            tracker=self.tracker,
            progress=self.progress,
            stop=self.stop,
            streaming=streaming_settings(self.config),
            resume=found.state if found else None,
            still_ours=self.lock.check,
        )

    def _geometry(self, checkpoint: Path) -> ModelGeometry:
        """The shape of a model that actors are about to load, from here on known to have all its weights.

        Raises ValueError; what the folder holds besides is said once.
        """
        geometry = ModelGeometry.read(checkpoint)
        if checkpoint not in self._checked:
            self._checked.add(checkpoint)
            for warning in check_weights(checkpoint).warnings:
                self.progress.say(f"warning: {warning}")
        return geometry

    def _plan_memory(self, geometry: ModelGeometry) -> None:
        """Before anything is loaded, once: sizes the KV pools for all stages to come. Raises ValueError if they cannot fit."""
        if self._memory is not None:
            return
        learners = {
            stage: self.config.sft_learner(1) if stage == "sft" else self.config.rl_learner(1)
            for stage, plan in self.store.plans.items()
            if stage in TRAINING and not plan.skip
        }
        splits = ["train"] if learners else []
        if "eval" in self.config.job.stages and self.config.eval.score_logs:
            learners["eval"] = self.config.learner
        devices = self._ready_session().devices()
        evaluates = "eval" in self.config.job.stages or self.config.eval.every
        splits += ["heldout"] if evaluates else []
        tasks = tuple(task for split in splits for task in self._loaded(split).tasks)
        self._memory = plan_run(self.config, learners, geometry, tasks, devices)
        self._devices = [*devices[0], *devices[1]]
        for line in self._memory.lines:
            self.progress.say(line)

    def _report_usage(self, stage: str, by_kind: dict[str, LogpDiff] | None = None) -> None:
        """Where time and memory went: in words, and in run_root/usage.json."""
        assert self._memory is not None
        report = usage_report(self._ready_session().usage(), self._devices, self._memory, by_kind or {})
        for line in usage_lines(report):
            self.progress.say(line)
        self.tracker.artifact(write_usage(self.root, stage, report))

    def _ready_session(self) -> Session:
        assert self.session is not None
        pids = self.session.wait_ready()
        if not self._introduced:
            named = ", ".join(f"{name} {pid}" for name, pid in pids.items())
            self.progress.say(f"actors ready after {time.monotonic() - self.began:.0f} s (pids: {named})")
            self._introduced = True
        return self.session

    def _loaded(self, split: str) -> TaskFile:
        """Rows are read, and videos of unknown length opened, once a run."""
        if split not in self._splits:
            data = self.config.data
            path = getattr(data, split) or self.root / "data" / f"{split}.jsonl"
            self._splits[split] = load_tasks(
                path, format=data.format, video=data.video, ignore_fields=data.ignore_fields
            )
        return self._splits[split]

    def _tasks(self, split: str) -> tuple[StreamTask, ...]:
        loaded = self._loaded(split)
        for sample in loaded.skipped:
            self.progress.say(one_line(f"data: skipped {sample.source}: {sample.reason}"))
        self.bad_rows[split] = list(loaded.skipped)
        self.skipped += loaded.skipped
        return loaded.tasks

    def _initial_model(self) -> Path:
        if self.config.model.path:
            return resolve_checkpoint(self.config.model.path)
        model = self.config.model
        return self._ready_session().build_tiny(self.root / "model", model.tiny, self.config.seed, model.dtype)

    def _rl_start(self) -> Path:
        if self.config.algorithm.init != "auto":
            return resolve_checkpoint(self.config.algorithm.init, "algorithm.init")
        return cold_start(self.root) or self._initial_model()

    def _eval_checkpoints(self) -> dict[str, Path]:
        chosen = self.config.eval.checkpoint
        if chosen == "best":
            return {"best": self.root / "checkpoints" / "rl" / "best" / "hf"}
        if chosen != "auto":
            return {checkpoint_label(chosen): resolve_checkpoint(chosen, "eval.checkpoint")}
        found = own_checkpoints(self.root)
        if found:
            return found
        if self.config.model.path:
            return {checkpoint_label(self.config.model.path): resolve_checkpoint(self.config.model.path)}
        raise ValueError(
            f"job=eval: no checkpoint under {self.root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
        )

    def _worker_setup(self, checkpoint: Path, freeze: str, version: int = 0) -> WorkerSetup:
        config = self.config
        assert self._memory is not None
        return WorkerSetup(
            checkpoint=str(checkpoint),
            dtype=config.model.dtype,
            layout=config.layout,
            memory=config.memory,
            video=config.data.video,
            freeze=freeze,
            max_streams=config.rollout.max_streams,
            kv_slots=self._memory.kv_slots,
            staging=config.weights.staging,
            monitor_every=config.monitor.every,
            off_above=self.monitor.limits.token,
            run_seed=config.seed,
            version=version,
            attention=config.rollout.attention,
            scoring_attention=config.learner.attention,
            vision_attention=config.model.vision_attention,
        )

    def _reference(self) -> Path:
        """What RL's KL is measured against: where RL started, also after a resume."""
        given = self.config.algorithm.reference
        if given != "auto":
            return resolve_checkpoint(given, "algorithm.reference")
        origin = self.store.read("rl").get("origin")
        if origin and self.config.algorithm.init == "auto":
            return reference_of_branch(Path(origin)) or self._initial_model()
        return self._rl_start()

    def _learner_setup(self, checkpoint: Path, learner: LearnerConfig, steps: int) -> LearnerSetup:
        return LearnerSetup(
            checkpoint=str(checkpoint),
            layout=self.config.layout,
            learner=asdict(learner),
            total_steps=steps,
            seed=self.config.seed,
            off_above=self.monitor.limits.token,
            vision_attention=self.config.model.vision_attention,
        )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
