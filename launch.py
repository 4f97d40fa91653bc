"""Entry point: composes the Hydra config, validates it, and runs the job's stages in one Ray session.

    python launch.py                                  # job=all: data, cold start, RL, evaluation
    python launch.py job=data|sft|rl|eval [KEY=VALUE ...]
    python launch.py --help

Owner: launch. Invariant: a bad configuration or missing data stops before any actor starts.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf.schema import RunConfig, load_config

ConfigStore.instance().store(name="schema", node=OmegaConf.to_container(OmegaConf.structured(RunConfig)))


class Run:
    """One invocation: the stages share the session, the tracker and the clock.

    Stages import what they need when they run: `--help` and a config error must not wait for torch and Ray.
    """

    def __init__(self, config: RunConfig) -> None:
        from rl.cluster import Session
        from rl.tracking import Progress, Tracker

        self.config = config
        self.root = config.root.resolve()
        self.began = time.monotonic()
        self.progress = Progress()
        self.skipped: list[Any] = []
        self.bad_rows: dict[str, list[Any]] = {}
        self._introduced = False
        self.root.mkdir(parents=True, exist_ok=True)
        for line in describe(config):
            self.progress.say(line)
        self.tracker = Tracker(config.tracking, self.root, f"{config.job.name}-seed{config.seed}")
        self.tracker.params(_flat(asdict(config)))
        try:
            # Actors import while the driver makes the data.
            self.session = Session(config) if set(config.job.stages) - {"data"} else None
            # Only now: a run that cannot start must not cost the results of the one before.
            _clear_outputs(self.root, config.job.stages)
        except BaseException:
            self.tracker.close("FAILED")
            raise

    def run(self) -> None:
        status = "FAILED"
        try:
            for stage in self.config.job.stages:
                getattr(self, f"stage_{stage}")()
            status = "FINISHED"
        finally:
            self.tracker.close(status)
            if self.session is not None:
                self.session.close()

    def stage_data(self) -> None:
        """Generate the quickstart's clips, unless the data are the user's own."""
        from streams.synthetic import generate

        if self.config.data.train:
            self.progress.say(f"data: using {self.config.data.train} and {self.config.data.heldout}")
            return
        began = time.monotonic()
        made = generate(self.root / "data", self.config.data.synthetic)
        self.progress.say(f"data: {made.train_jsonl} and {made.heldout_jsonl} in {time.monotonic() - began:.1f} s")

    def stage_sft(self) -> None:
        from evals.summary import write_json
        from sft.loop import run_sft

        session = self._ready_session()
        tasks = self._tasks("train")
        checkpoint = self._initial_model()
        learner = self.config.learner.with_overrides(self.config.sft.learner)
        session.setup_workers(self._worker_setup(checkpoint, learner.freeze))
        session.setup_learner(self._learner_setup(checkpoint, learner, self.config.sft.steps))
        result = run_sft(self.config, session, tasks, self.tracker, self.progress, self._streaming())
        self.skipped += result.skipped
        result.skipped = [*self.bad_rows["train"], *result.skipped]
        write_json(self.root / "stages" / "sft.json", _plain(asdict(result)))
        self.progress.say(
            f"sft: {result.steps} steps in {result.seconds:.0f} s, loss {result.first_loss:.3f} -> {result.last_loss:.3f}"
        )

    def stage_rl(self) -> None:
        from evals.summary import write_json
        from rl.loop import RLLoop

        session = self._ready_session()
        tasks = self._tasks("train")
        checkpoint = self._rl_start()
        infos = session.setup_workers(self._worker_setup(checkpoint, self.config.learner.freeze))
        trained = session.setup_learner(
            self._learner_setup(checkpoint, self.config.learner, self.config.algorithm.steps)
        )
        self.progress.say(
            f"rl: {infos[0].kv_slots} KV slots on each worker; {trained:,} of {infos[0].parameters:,} parameters train "
            f"(learner.freeze={self.config.learner.freeze})"
        )
        loop = RLLoop(self.config, session, tasks, self.tracker, self.progress, self._streaming())
        result = loop.run()
        self.skipped += result.skipped
        result.skipped = [*self.bad_rows["train"], *result.skipped]
        write_json(self.root / "stages" / "rl.json", _plain(asdict(result)))
        self.progress.say(
            f"rl: {result.steps} steps in {result.seconds:.0f} s, mean reward {result.mean_reward_first:.3f} -> "
            f"{result.mean_reward_last:.3f}, ages up to {result.max_age} (bound {loop.buffer.limits.bound})"
        )
        published = {
            "max_abs_logp_diff": result.published.max,
            "mean_abs_logp_diff": result.published.mean,
            "logp_diff_tokens": result.published.tokens,
        }
        check_mismatch(self.config, published)

    def stage_eval(self) -> None:
        from evals.job import run_evaluation

        session = self._ready_session()
        summary = run_evaluation(
            self.config,
            session,
            self._tasks("heldout"),
            self._eval_checkpoints(),
            self._worker_setup,
            lambda checkpoint: self._learner_setup(checkpoint, self.config.learner, 1),
            self.tracker,
            self.progress,
        )
        summary["wall_s"] = time.monotonic() - self.began
        summary = self._finish_summary(summary)
        self.progress.say(f"summary: {self.root / 'summary.json'}")
        if self.tracker.enabled:
            self.progress.say(f"metrics: .venv/bin/mlflow ui --backend-store-uri {self.tracker.uri}")
        if self.config.eval.score_logs:
            check_mismatch(self.config, summary)

    def _finish_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        from evals.summary import print_table, read_json, write_json

        rl = read_json(self.root / "stages" / "rl.json")
        skipped = {(s.source, s.reason) for s in self.skipped}
        skipped |= {(s["source"], s["reason"]) for s in summary.pop("skipped_heldout")}
        for stage in ("sft", "rl"):
            earlier = read_json(self.root / "stages" / f"{stage}.json").get("skipped", [])
            skipped |= {(s["source"], s["reason"]) for s in earlier}
        summary = {
            "seed": self.config.seed,
            **summary,
            "skipped_samples": len(skipped),
            "skipped": [{"source": source, "reason": reason} for source, reason in sorted(skipped)],
            "learner_steps": rl.get("steps"),
            "max_age": rl.get("max_age"),
            "weight_versions_seen": len(rl["versions_seen"]) if rl else None,
            "age0_max_abs_logp_diff": rl.get("age0", {}).get("max"),
            "age0_logp_diff_tokens": rl.get("age0", {}).get("tokens", 0),
            "published_max_abs_logp_diff": rl.get("published", {}).get("max"),
            "published_logp_diff_tokens": rl.get("published", {}).get("tokens", 0),
            "worker_max_abs_logp_diff": rl.get("monitor", {}).get("max"),
            "worker_logp_diff_tokens": rl.get("monitor", {}).get("tokens", 0),
            "clips_encoded": rl.get("clips_encoded"),
            "distinct_clips": rl.get("distinct_clips"),
        }
        write_json(self.root / "summary.json", summary)
        self.tracker.artifact(self.root / "summary.json")
        print_table(self.progress.console, summary)
        return summary

    # --- what the stages share --------------------------------------------------------------------------------

    def _ready_session(self) -> Any:
        assert self.session is not None
        pids = self.session.wait_ready()
        if not self._introduced:
            named = ", ".join(f"{name} {pid}" for name, pid in pids.items())
            self.progress.say(f"actors ready after {time.monotonic() - self.began:.0f} s (pids: {named})")
            self._introduced = True
        return self.session

    def _tasks(self, split: str) -> tuple[Any, ...]:
        from streams.dataset import load_tasks

        path = getattr(self.config.data, split) or self.root / "data" / f"{split}.jsonl"
        loaded = load_tasks(path)
        for sample in loaded.skipped:
            self.progress.say(f"data: skipped {sample.source}: {sample.reason}")
        self.bad_rows[split] = list(loaded.skipped)
        self.skipped += loaded.skipped
        return loaded.tasks

    def _initial_model(self) -> Path:
        from streams.backbone import resolve_checkpoint
        from streams.tiny import build_tiny

        if self.config.model.path:
            return resolve_checkpoint(self.config.model.path)
        return build_tiny(self.root / "model", self.config.model.tiny, seed=self.config.seed)

    def _rl_start(self) -> Path:
        from streams.backbone import resolve_checkpoint

        cold = self.root / "checkpoints" / "sft" / "hf"
        if self.config.algorithm.init != "auto":
            return resolve_checkpoint(self.config.algorithm.init)
        return cold if cold.is_dir() else self._initial_model()

    def _eval_checkpoints(self) -> dict[str, Path]:
        from streams.backbone import resolve_checkpoint

        if self.config.eval.checkpoint != "auto":
            return {"rl": resolve_checkpoint(self.config.eval.checkpoint)}
        made = {
            "sft": self.root / "checkpoints" / "sft" / "hf",
            "rl": self.root / "checkpoints" / "rl" / "final" / "hf",
        }
        found = {name: path for name, path in made.items() if path.is_dir()}
        if found:
            return found
        if self.config.model.path:
            return {"sft": resolve_checkpoint(self.config.model.path)}
        raise ValueError(
            f"job=eval: no checkpoint under {self.root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
        )

    def _worker_setup(self, checkpoint: Path, freeze: str) -> Any:
        from streams.messages import WorkerSetup

        config = self.config
        return WorkerSetup(
            checkpoint=str(checkpoint),
            dtype=config.model.dtype,
            layout=config.layout,
            memory=config.memory,
            video=config.data.video,
            freeze=freeze,
            max_streams=config.rollout.max_streams,
            kv_memory_mb=config.rollout.kv_memory_mb,
            monitor_every=config.rollout.monitor_every,
            run_seed=config.seed,
        )

    def _learner_setup(self, checkpoint: Path, learner: Any, steps: int) -> Any:
        from streams.messages import LearnerSetup

        return LearnerSetup(
            checkpoint=str(checkpoint),
            layout=self.config.layout,
            learner=asdict(learner),
            total_steps=steps,
            seed=self.config.seed,
        )

    def _streaming(self) -> dict[str, Any]:
        """What a checkpoint must carry to be run as it was trained (streaming.json)."""
        config = self.config
        video = config.data.video
        return {
            "format": 1,
            "layout": asdict(config.layout),
            "chunk_seconds": video.chunk_seconds,
            "frames_per_chunk": video.frames_per_chunk,
            "min_pixels": video.min_pixels,
            "max_pixels": video.max_pixels,
            "memory": asdict(config.memory),
            "score_temperature": config.rollout.temperature,
        }


def check_mismatch(config: RunConfig, summary: dict[str, Any]) -> None:
    """Raises RuntimeError if learner and engine disagree on the held-out logs, or if no token was compared."""
    single = config.model.dtype == config.learner.dtype == "float32"
    if config.eval.max_logp_diff:
        key, limit = "max_abs_logp_diff", config.eval.max_logp_diff
    else:
        key, limit = ("max_abs_logp_diff", 1e-3) if single else ("mean_abs_logp_diff", 1e-2)
    # Written so that NaN fails, too.
    if summary[key] is None or not summary[key] <= limit:
        raise RuntimeError(
            f"learner and engine disagree: {key}={summary[key]} over {summary['logp_diff_tokens']} tokens is above "
            f"{limit} (eval.max_logp_diff={config.eval.max_logp_diff:g})"
        )


def describe(config: RunConfig) -> list[str]:
    """The derived quantities of a run, printed before it starts."""
    from rl.buffer import AgeBound
    from streams.log import BYTES_PER_TOKEN

    algorithm = config.algorithm
    age = AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag)
    memory = config.memory
    video = config.data.video
    # Merged tokens of 28 x 28 pixels, two frames a temporal patch; a turn's scaffold is 13 tokens.
    per_turn = video.max_pixels // 28**2 * (video.frames_per_chunk // 2) + 13 + config.layout.max_new_tokens
    log_kib = BYTES_PER_TOKEN * per_turn * config.data.max_turns / 1024
    kept = "everything" if memory.name == "full" else f"the last {memory.window} chunks"
    return [
        f"run: job={config.job.name} seed={config.seed} run_root={config.root.resolve()}",
        f"rl: {algorithm.groups_per_step} groups x {algorithm.group_size} = {config.streams_per_step} streams per step, "
        f"{algorithm.steps} steps; age bound ({algorithm.groups_in_flight} - 1) // {algorithm.groups_per_step} + "
        f"{config.weights.max_lag} = {age.bound}",
        f"memory: {memory.name}, video of {kept}; KV pool {config.rollout.kv_memory_mb} MiB on each of "
        f"{config.rollout.workers} workers, up to {config.rollout.max_streams} streams each",
        f"log budget: at most about {log_kib:.0f} KiB a stream, {log_kib * config.streams_per_step / 1024:.1f} MiB a step; "
        f"frames and features cached: {config.data.cache_mb} MiB each per worker",
    ]


def preflight(config: RunConfig) -> None:
    """What can be known to fail before any actor starts."""
    from rl.buffer import AgeBound
    from streams.backbone import is_hub_id
    from streams.dataset import load_tasks

    algorithm = config.algorithm
    AgeBound(algorithm.groups_in_flight, algorithm.groups_per_step, config.weights.max_lag)
    stages = set(config.job.stages)
    needed = [split for split, by in (("train", {"sft", "rl"}), ("heldout", {"eval"})) if stages & by]
    for split in needed:
        given = getattr(config.data, split)
        path = Path(given) if given else config.root / "data" / f"{split}.jsonl"
        if given or "data" not in stages:
            if not path.is_file():
                raise FileNotFoundError(f"data.{split}: {path} does not exist (set data.{split} or run job=data first)")
            # Rows are read again, and bad ones named, when a stage uses them; a file without one usable row ends here.
            load_tasks(path)
    for key, value in (
        ("model.path", config.model.path),
        ("algorithm.init", config.algorithm.init),
        ("eval.checkpoint", config.eval.checkpoint),
    ):
        if value in ("", "auto"):
            continue
        if not Path(value).expanduser().is_dir() and not is_hub_id(value):
            raise FileNotFoundError(f"{key}={value}: no such folder, and not a hub id of the form owner/name")
        _check_not_replaced(config, key, value)
    unset = config.eval.checkpoint == "auto" and not config.model.path
    if stages == {"eval"} and unset and not list(config.root.glob("checkpoints/**/hf")):
        raise FileNotFoundError(
            f"job=eval: no checkpoint under {config.root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
        )


REPLACES = {
    "sft": ["checkpoints/sft", "stages/sft.json", "checkpoints/rl", "stages/rl.json", "summary.json"],
    "rl": ["checkpoints/rl", "stages/rl.json", "summary.json"],
    "eval": ["summary.json"],
}
"""What a stage replaces: its own output and what was made from it; tracking history stays."""


def _clear_outputs(root: Path, stages: list[str]) -> None:
    for name in {name for stage in stages for name in REPLACES.get(stage, [])}:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def _check_not_replaced(config: RunConfig, key: str, value: str) -> None:
    """A run may not start from a checkpoint that it is about to replace."""
    source = Path(value).expanduser().resolve()
    for name in {name for stage in config.job.stages for name in REPLACES.get(stage, [])}:
        replaced = (config.root / name).resolve()
        if source == replaced or replaced in source.parents:
            raise ValueError(
                f"{key}={value} lies in {replaced}, which job={config.job.name} replaces: copy it elsewhere or choose "
                "another run_root"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(values: Any) -> Any:
    """JSON-ready: sets become sorted lists."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, set):
        return sorted(values)
    return [_plain(v) for v in values] if isinstance(values, list | tuple) else values


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(raw: DictConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(raw)
        preflight(config)
        run = Run(config)
    except (ValueError, OSError) as error:  # a missing file, a full disk, a wait for Ray (TimeoutError is an OSError)
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)
    run.run()


if __name__ == "__main__":
    main()
