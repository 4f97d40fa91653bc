"""Which stages of a run are finished, and with which settings: the manifests under `run_root/stages`.

One JSON file per stage: `status` begun or finished, `settings` (every key that the stage's outcome depends
on), `attempts`, `result`; `origin` if it continued from a checkpoint of another run_root.

Invariants:
* `resume=auto` runs a finished stage again only if its last checkpoint is lost and still needed;
* a stage is only continued under the settings that it began with;
* a start that left no checkpoint binds nothing;
* keys that change how fast a stage runs, not what it computes, may change;
* planning deletes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.jobs import JobConfig
from conf.paths import with_home
from conf.schema import RunConfig
from runtime.store.checkpoint import Found, by_age, newest_usable, read_state, set_aside_after, verify
from streams.memory import CUSTOM
from streams.support.files import digest
from streams.support.redact import stored_setting
from streams.support.strict_json import dumps

TRAINING = ("sft", "rl")
MANIFESTS = ("data", *TRAINING)

_STAGE_KEYS = {
    "data": ("data.synthetic.",),
    "sft": ("seed", "model.", "memory.", "layout.", "data.", "learner.", "sft.", "deterministic"),
    "rl": (
        *("seed", "model.", "memory.", "layout.", "data.", "learner.", "rollout.", "algorithm.", "reward."),
        "deterministic",
    ),
}
"""Prefixes of the keys that a stage's outcome depends on."""

_LEARNER_FREE = (
    *("threads", "head_chunk", "head_vocab", "row_tokens", "micro_batch_tokens", "attention"),
    *("activation_checkpointing", "collective_timeout_s"),
)

_ROLLOUT_FREE = ("workers", "max_streams", "kv_memory_mb", "group_deadline_s", "threads", "attention")
_FREE = (
    *(f"rollout.{key}" for key in _ROLLOUT_FREE),
    "model.vision_attention",
    "model.fused_kernels",
    *(f"learner.{key}" for key in _LEARNER_FREE),
    *(f"sft.learner.{key}" for key in _LEARNER_FREE),
    *(f"data.{key}" for key in ("train", "heldout", "root", "cache_mb", "video.decode_timeout_s")),
    *(f"algorithm.{key}" for key in ("groups_in_flight", "stop_when", "stop_steps")),
    *("reward.timeout_s", "reward.workers"),
)
"""Keys among those that change how a stage runs, not what it computes. (data.train is compared by its content.)"""

_MAY_GROW = ("sft.steps", "algorithm.steps")

_SHOWN = 8
"""Changed keys that a message lists."""

REPLACES = {
    "data": ["stages/data.json"],
    "sft": ["checkpoints/sft", "stages/sft.json", "stages/sft.steps.jsonl", "transcripts"],
    "rl": ["checkpoints/rl", "stages/rl.json", "stages/rl.steps.jsonl", "transcripts"],
    "eval": ["summary.json", "evaluations"],
}
"""What a stage writes; a stage that starts over replaces its own and what was made from it. Tracking history stays."""
_MADE_FROM = {"data": ["data"], "sft": ["sft", "rl", "eval"], "rl": ["rl", "eval"], "eval": ["eval"]}


def replaced_by(stages: list[str]) -> set[str]:
    """Return the paths under run_root that running `stages` from their start replaces."""
    return {name for stage in stages for made in _MADE_FROM.get(stage, []) for name in REPLACES[made]}


@dataclass(frozen=True)
class StagePlan:
    """What to do about one stage. resume: the checkpoint that it continues from. attempt counts from 1."""

    stage: str
    skip: bool = False
    resume: Found | None = None
    attempt: int = 1
    fresh: bool = True

    @property
    def step(self) -> int:
        return self.resume.state.step if self.resume else 0


@dataclass
class StageStore:
    """Reads and writes the manifests of one run_root.

    content: digest of data.train as it was read; None: it was not, and is hashed as soon as a stage is compared by it.
    settled: the stages that go on from a checkpoint, and have set aside what was beyond it.
    corrected: whether a stage starts over under other settings than those of an attempt that left nothing.
    """

    root: Path
    config: RunConfig
    say: Callable[[str], None]
    content: str | None = None
    plans: dict[str, StagePlan] = field(default_factory=dict)
    corrected: bool = False
    settled: set[str] = field(default_factory=set)

    def settings(self, stage: str) -> dict[str, Any]:
        """Return what the stage's outcome depends on; the file may have changed since it was read."""
        if self.content is None and stage in TRAINING and self.config.data.train:
            self.content = digest(Path(self.config.data.train))
        return settings(self.config, stage, self.content)

    def path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def read(self, stage: str) -> dict[str, Any]:
        """Return the manifest of a stage, {} if there is none. Raises ValueError that names a damaged one."""
        path = self.path(stage)
        if not path.is_file():
            return {}
        try:
            values = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): go on with resume=FOLDER, a checkpoint of the stage, or start over with "
                "resume=never"
            ) from error
        return values if isinstance(values, dict) else {}

    def result(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage reported; {} if it is not finished."""
        manifest = self.read(stage)
        return manifest.get("result", {}) if manifest.get("status") == "finished" else {}

    def begin(self, stage: str) -> None:
        """Record that a stage runs, with its settings.

        A finished stage that continues stays finished until `settle`: if it cannot start, nothing has changed.
        """
        if self.plans[stage].resume is None or self._readable(stage).get("status") != "finished":
            self._note_begun(stage)

    def _note_begun(self, stage: str) -> None:
        plan = self.plans[stage]
        manifest = {
            "stage": stage,
            "status": "begun",
            "attempts": plan.attempt,
            "settings": self.settings(stage),
        }
        if origin := self._origin(stage):
            manifest["origin"] = origin
        self._write(stage, manifest)

    def adopt(self, stage: str) -> None:
        """Record a skipped stage as finished: the checkpoint that a later stage resumes from already includes it."""
        later = [plan.resume.path for plan in self.plans.values() if plan.resume]
        if later and not self._readable(stage):
            manifest = {"stage": stage, "status": "finished", "attempts": 0, "result": {}, "origin": str(later[0])}
            self._write(stage, manifest | {"settings": self.settings(stage)})

    def settle(self, stage: str) -> None:
        """Set aside the checkpoints beyond the one that the stage continues from: later, damaged, or of another history.

        Called only once nothing more can keep the stage from running.
        """
        found = self.plans[stage].resume
        if found is None:
            return
        self.settled.add(stage)
        own = self._own(stage)
        for name in set_aside_after(own, found.state.step if own in found.path.parents else -1):
            self.say(f"{stage}: set aside {own / name}: the stage goes on from {found.path}")
        self._note_begun(stage)

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        self._write(stage, self.read(stage) | {"status": "finished", "result": result})

    def plan(self) -> dict[str, StagePlan]:
        """Decide about every stage of the job, from `resume` and what lies under run_root. Raises ValueError."""
        wanted = [stage for stage in self.config.job.stages if stage in MANIFESTS]
        if self.config.resume == "never":
            self.plans = {stage: StagePlan(stage) for stage in wanted}
        elif self.config.resume == "auto":
            self.plans = {stage: self._auto(stage) for stage in wanted}
        else:
            self.plans = self._from_path(Path(self.config.resume).resolve(), wanted)
        return self.plans

    def again(self, stage: str) -> StagePlan:
        """Plan a stage anew that was under way in this run, from what it has left; as before if it had not got to training."""
        before = self.plans[stage]
        same = before.resume is not None and stage not in self.settled
        plan = replace(before, attempt=before.attempt + 1) if same else self._auto(stage)
        assert not plan.skip, "a stage that was under way is not finished"
        self.plans[stage] = plan
        return plan

    def _auto(self, stage: str) -> StagePlan:
        manifest = self.read(stage)
        if not manifest:
            self._check_nothing_later(stage)
            self._check_no_orphans(stage)
            return StagePlan(stage)
        attempts = int(manifest.get("attempts", 1))
        if stage == "data" and (manifest.get("status") != "finished" or not self._data_there()):
            return self._restarted(stage, manifest, attempts + 1)
        if before := self._binding(stage, manifest):
            self._check_settings(stage, before)
        result = manifest.get("result", {})
        grown = stage in TRAINING and self._total(stage) > int(result.get("steps") or 1 << 60)
        # A stage that ended early, as it would again, has not grown.
        grown = grown and not self.config.algorithm.satisfied_by(result.get("saturated_at"))
        if manifest.get("status") == "finished":
            if grown:
                self._check_nothing_made_from(stage)
            elif self._stands(stage, manifest):
                return StagePlan(stage, skip=True, attempt=attempts, fresh=False)
        found = self._newest(stage, manifest) if stage in TRAINING else None
        if found is None:
            return self._restarted(stage, manifest, attempts + 1)
        return self._continued(stage, found, attempts + 1)

    def _restarted(self, stage: str, manifest: dict[str, Any], attempt: int) -> StagePlan:
        if changed := self._changed(stage, manifest.get("settings", {})):
            self.corrected = True
            self.say(
                f"{stage}: starts over, the attempt before left nothing to go on from; now with {_listed(changed)}"
            )
        return StagePlan(stage, attempt=attempt)

    @property
    def charts_go_on(self) -> bool:
        """Whether the tracker continues the MLflow run of an earlier attempt.

        It does if that one trained something, or if the same settings start again. Parameters of a failed start must not
        appear beside what corrected ones train.
        """
        resumed = any(plan.resume for plan in self.plans.values())
        # A stage that this job runs brings its steps into a new MLflow run by its journal.
        elsewhere = any(by_age(self._own(stage)) for stage in TRAINING if stage not in self.plans)
        noted = any(self._readable(stage) for stage in TRAINING)
        return resumed or elsewhere or (noted and not self.corrected)

    def _binding(self, stage: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that the stage must keep; {} if it has nothing to continue from.

        Generated data and a finished stage are bound by their manifest. A stage that only began is bound by the
        checkpoint that it would continue from: what a failed start recorded means nothing.
        """
        noted = dict(manifest.get("settings", {}))
        if stage == "data":
            return {} if self.config.data.train else noted
        if _adopted(manifest):
            return {}
        if manifest.get("status") == "finished":
            return noted
        # One that was set aside for its successor counts, too: `newest_usable` puts it back.
        own = self._own(stage)
        held = [*by_age(own), *sorted(own.glob("*.replaced"))]
        for path in held or ([Path(manifest["origin"])] if "origin" in manifest else []):
            try:
                state = read_state(path)
            except (OSError, ValueError):
                continue
            return state.settings or (noted if held else {})
        return noted if held else {}

    def _newest(self, stage: str, manifest: dict[str, Any]) -> Found | None:
        """Return the newest usable checkpoint; None if the stage has none yet. Raises ValueError if all are damaged."""
        own = self._own(stage)
        found = newest_usable(own, self.say)
        if found is None and (unusable := by_age(own)):
            raise ValueError(
                f"resume=auto: none of the {len(unusable)} checkpoints in {own} can be used (named above); restore one, or "
                "start over with resume=never (which deletes them)"
            )
        return found or (self._verified(manifest["origin"]) if "origin" in manifest else None)

    def _continued(self, stage: str, found: Found, attempt: int) -> StagePlan:
        if not found.resumable:
            self.say(
                f"checkpoint {found.path} holds no optimiser state (checkpoint.optimizer=latest or none): {stage} goes on from "
                f"its weights, the optimiser's moments start at zero"
            )
        self.say(f"{stage}: going on from {found.path} (step {found.state.step}, attempt {attempt})")
        return StagePlan(stage, resume=found, attempt=attempt, fresh=False)

    def _stands(self, stage: str, manifest: dict[str, Any]) -> bool:
        """Return whether a finished stage can be left alone: what it made is whole, or nothing will start from it."""
        if stage not in TRAINING or _adopted(manifest):
            return True
        try:
            verify(self._own(stage) / "final")
        except (ValueError, OSError) as error:
            self.say(f"{stage}: finished before, but its last checkpoint cannot be used: {error}")
            return any(by_age(self._own(later)) for later in _later(stage))
        return True

    def _from_path(self, path: Path, wanted: list[str]) -> dict[str, StagePlan]:
        """Return the plans: stages before the checkpoint's own are skipped, that one continues, later ones start."""
        found = self._verified(str(path))
        stage = found.state.stage
        if stage not in wanted:
            raise ValueError(
                f"resume={self.config.resume} is a checkpoint of stage {stage}, which job={self.config.job.name} does "
                f"not run (its stages: {', '.join(self.config.job.stages)})"
            )
        plans = {}
        for name in wanted:
            earlier = MANIFESTS.index(name) < MANIFESTS.index(stage)
            # Data are skipped only if they are there: the generator makes the same ones again.
            skip = earlier and (name != "data" or bool(self.config.data.train) or self.path("data").is_file())
            plans[name] = StagePlan(name, skip=skip, fresh=not earlier)
        manifest = self._readable(stage)
        # A checkpoint says itself what its stage began with: the manifest may be elsewhere.
        before = found.state.settings
        if not before and self._own(stage) in path.parents:
            before = manifest.get("settings", {})
        if before:
            self._check_settings(stage, before)
        plans[stage] = self._continued(stage, found, int(manifest.get("attempts", 0)) + 1)
        return plans

    def _verified(self, path: str) -> Found:
        try:
            return verify(Path(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"resume={self.config.resume}: {path} cannot be used: {error}") from error

    def _check_settings(self, stage: str, before: dict[str, Any]) -> None:
        now = self.settings(stage)
        for key in _MAY_GROW:
            if key in before and key in now and now[key] > before[key]:
                self.say(f"{stage}: {key} grows from {before[key]} to {now[key]}")
                before = before | {key: now[key]}
        if changed := self._changed(stage, before):
            raise ValueError(
                f"resume={self.config.resume}: stage {stage} for {self.root} began with other settings: {_listed(changed)}. "
                "Restore them, or start anew: in another run_root (algorithm.init=FOLDER starts RL from a checkpoint's "
                "weights), or with resume=never (which replaces what is there)"
            )

    def _changed(self, stage: str, before: dict[str, Any]) -> list[str]:
        """Return the keys whose values are not those of `before`, each with both values."""
        now = self.settings(stage)
        if before.get("memory.name") != CUSTOM:
            # Earlier versions accepted, and recorded, a policy that was named but not chosen: it was never used.
            before = {key: v for key, v in before.items() if not key.startswith(("memory.target", "memory.args"))}
        # A key that did not exist when the stage began had no other effect than its default has.
        default = flat(asdict(RunConfig(job=JobConfig("rl", ["rl"]))))
        before = {key: plain(default[key]) for key in now.keys() - before.keys() if key in default} | before
        # Stages that began before paths were expanded where the configuration is loaded, and secrets masked.
        before = {key: stored_setting(key, with_home(key, value)) for key, value in before.items()}
        # One that has become free since then is free for stages that noted it, too.
        before = {key: value for key, value in before.items() if key not in _FREE}
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        return [f"{key}={now.get(key)!r}, began with {before.get(key)!r}" for key in keys]

    def _check_nothing_later(self, stage: str) -> None:
        """Raise ValueError if the stage would replace what was made from it."""
        if later := [s for s in _later(stage) if self._made(s)]:
            raise ValueError(
                f"resume=auto: {self.root} holds stage {later[0]} but not {stage}, and running {stage} would replace it: "
                "choose another run_root, or start over with resume=never"
            )

    def _check_nothing_made_from(self, stage: str) -> None:
        if later := [s for s in _later(stage) if self._made(s)]:
            raise ValueError(
                f"resume=auto: stage {stage} cannot grow: stage {later[0]} in {self.root} was made from it as it is. Choose "
                "another run_root, or start over with resume=never"
            )

    def _made(self, stage: str) -> bool:
        """Return whether a stage has anything to lose: more than a record that it began."""
        manifest = self.read(stage)
        return (
            manifest.get("status") == "finished" or "origin" in manifest or bool(manifest and by_age(self._own(stage)))
        )

    def _check_no_orphans(self, stage: str) -> None:
        if stage in TRAINING and (orphans := by_age(self._own(stage))):
            raise ValueError(
                f"resume=auto: {orphans[0].parent} holds {len(orphans)} checkpoints, but {self.path(stage)}, which says what "
                "they are, is missing, and starting over would delete them: go on with resume=FOLDER (one of them), choose "
                "another run_root, or start over with resume=never"
            )

    def _own(self, stage: str) -> Path:
        return (self.root / "checkpoints" / stage).resolve()

    def _origin(self, stage: str) -> str:
        """Return the checkpoint of another run_root that the stage continues from, also in later attempts; '' if none."""
        found = self.plans[stage].resume
        if found is None or self._own(stage) in found.path.parents:
            return "" if found is None else str(self._readable(stage).get("origin", ""))
        return str(found.path)

    def _readable(self, stage: str) -> dict[str, Any]:
        try:
            return self.read(stage)
        except ValueError:
            return {}

    def _data_there(self) -> bool:
        folder = self.root / "data"
        return bool(self.config.data.train) or all((folder / f"{s}.jsonl").is_file() for s in ("train", "heldout"))

    def _total(self, stage: str) -> int:
        return self.config.sft.steps if stage == "sft" else self.config.algorithm.steps  # 0: given in epochs

    def _write(self, stage: str, manifest: dict[str, Any]) -> None:
        path = self.path(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        with aside.open("w") as file:
            file.write(dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def _adopted(manifest: dict[str, Any]) -> bool:
    """Return whether the stage never ran here: a later one continued from a checkpoint of another run_root."""
    return "origin" in manifest and not manifest.get("attempts")


def _listed(changed: list[str]) -> str:
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return "; ".join(changed[:_SHOWN]) + more


def _later(stage: str) -> list[str]:
    """Return the training stages that are made from this one."""
    return [s for s in TRAINING if s != stage and s in _MADE_FROM[stage]]


def settings(config: RunConfig, stage: str, content: str | None = None) -> dict[str, Any]:
    """Return every key that the stage's outcome depends on, flat, JSON-ready, with secrets masked.

    content: digest of data.train, if that is not to be what it is now.
    """
    values = flat(asdict(config))
    chosen = {
        key: stored_setting(key, value)
        for key, value in values.items()
        if any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for prefix in _STAGE_KEYS[stage])
        and key not in _FREE
    }
    if stage in TRAINING and config.data.train:
        chosen["data.train (content)"] = content or digest(Path(config.data.train))
    return json.loads(dumps(chosen))


def clear(root: Path, stages: list[str]) -> None:
    """Delete what running `stages` from their start replaces."""
    # Manifests first, later stages before earlier ones: a crash in between must not leave a stage that counts as
    # finished without its checkpoints, nor one that seems to be made from nothing.
    for name in sorted(replaced_by(stages), key=lambda name: (not name.startswith("stages/"), name)):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def plain(values: Any) -> Any:
    """Return the values JSON-ready: sets become sorted lists, tuples lists."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, set | frozenset):
        return sorted(values)
    return [plain(v) for v in values] if isinstance(values, list | tuple) else values
