"""Which stages of a run are finished, and with which settings: the manifests under `run_root/stages`.

Owner: rl. One JSON file per stage: `status` begun or finished, `settings` (every key that the stage's outcome depends
on), `attempts`, `result`. Invariants: a finished stage is never run again by `resume=auto`; a stage is only continued
under the settings that it began with; keys that change how fast, not what, are free.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from rl.checkpoint import Found, by_age, newest_usable, set_aside_after, verify

TRAINING = ("sft", "rl")
MANIFESTS = ("data", *TRAINING)

_STAGE_KEYS = {
    "data": ("data.synthetic.",),
    "sft": ("seed", "model.", "memory.", "layout.", "data.", "learner.", "sft.", "deterministic"),
    "rl": (
        "seed",
        "model.",
        "memory.",
        "layout.",
        "data.",
        "learner.",
        "rollout.",
        "algorithm.",
        "reward.",
        "deterministic",
    ),
}
"""Prefixes of the keys that a stage's outcome depends on."""

_FREE = (
    *(
        f"rollout.{key}"
        for key in ("workers", "max_streams", "kv_memory_mb", "monitor_every", "group_deadline_s", "threads")
    ),
    *(
        f"learner.{key}"
        for key in ("threads", "head_chunk", "row_tokens", "micro_batch_tokens", "attention", "collective_timeout_s")
    ),
    *(
        f"sft.learner.{key}"
        for key in ("threads", "head_chunk", "row_tokens", "micro_batch_tokens", "attention", "collective_timeout_s")
    ),
    *(f"data.{key}" for key in ("train", "heldout", "cache_mb", "video.decode_timeout_s")),
    "algorithm.groups_in_flight",
)
"""Keys among those that change how a stage runs, not what it computes. (data.train is compared by its content.)"""

_MAY_GROW = ("sft.steps", "algorithm.steps")

REPLACES = {
    "data": ["stages/data.json"],
    "sft": ["checkpoints/sft", "stages/sft.json", "stages/sft.steps.jsonl", "transcripts"],
    "rl": ["checkpoints/rl", "stages/rl.json", "stages/rl.steps.jsonl", "transcripts"],
    "eval": ["summary.json"],
}
"""What a stage writes; a stage that starts over replaces its own and what was made from it. Tracking history stays."""
_MADE_FROM = {"data": ["data"], "sft": ["sft", "rl", "eval"], "rl": ["rl", "eval"], "eval": ["eval"]}


def replaced_by(stages: list[str]) -> set[str]:
    """Paths under run_root that running `stages` from their start replaces."""
    return {name for stage in stages for made in _MADE_FROM.get(stage, []) for name in REPLACES[made]}


@dataclass(frozen=True)
class StagePlan:
    """What to do about one stage. resume: the checkpoint it goes on from. attempt counts from 1."""

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
    """Reads and writes the manifests of one run_root."""

    root: Path
    config: RunConfig
    say: Callable[[str], None]
    plans: dict[str, StagePlan] = field(default_factory=dict)

    def path(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def read(self, stage: str) -> dict[str, Any]:
        """The manifest of a stage, {} if there is none. Raises ValueError that names a damaged one."""
        path = self.path(stage)
        if not path.is_file():
            return {}
        try:
            values = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or start over with resume=never") from error
        return values if isinstance(values, dict) else {}

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage reported, {} if it is not finished."""
        manifest = self.read(stage)
        return manifest.get("result", {}) if manifest.get("status") == "finished" else {}

    def begin(self, stage: str) -> None:
        """Note that a stage runs, with its settings."""
        plan = self.plans[stage]
        manifest = {
            "stage": stage,
            "status": "begun",
            "attempts": plan.attempt,
            "settings": settings(self.config, stage),
        }
        self._write(stage, manifest)

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
            self.plans = self._from_path(Path(self.config.resume).expanduser().resolve(), wanted)
        return self.plans

    def _auto(self, stage: str) -> StagePlan:
        manifest = self.read(stage)
        if not manifest:
            self._check_nothing_later(stage)
            return StagePlan(stage)
        self._check_settings(stage, manifest)
        if stage == "data" and not self._data_there():
            return StagePlan(stage, attempt=int(manifest.get("attempts", 1)) + 1)
        attempts = int(manifest.get("attempts", 1))
        grown = stage in TRAINING and self._total(stage) > int(manifest.get("result", {}).get("steps") or 1 << 60)
        if manifest.get("status") == "finished" and not grown:
            return StagePlan(stage, skip=True, attempt=attempts, fresh=False)
        found = newest_usable(self.root / "checkpoints" / stage, self.say) if stage in TRAINING else None
        if found is None:
            unusable = by_age(self.root / "checkpoints" / stage) if stage in TRAINING else []
            if unusable:
                raise ValueError(
                    f"resume=auto: none of the {len(unusable)} checkpoints in {unusable[0].parent} can be used (named "
                    "above); restore one, or start over with resume=never (which deletes them)"
                )
            return StagePlan(stage, attempt=attempts + 1)
        if not found.resumable:
            self.say(
                f"checkpoint {found.path} holds no optimiser state (checkpoint.optimizer=latest): {stage} goes on from "
                f"its weights, the optimiser's moments start at zero"
            )
        self.say(f"{stage}: going on from {found.path} (step {found.state.step}, attempt {attempts + 1})")
        return StagePlan(stage, resume=found, attempt=attempts + 1, fresh=False)

    def _from_path(self, path: Path, wanted: list[str]) -> dict[str, StagePlan]:
        """Stages before the checkpoint's own are skipped, that one goes on from it, later ones start."""
        try:
            found = verify(path)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"resume={self.config.resume} cannot be used: {error}") from error
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
        own = (self.root / "checkpoints" / stage).resolve()
        if own in path.parents and self.read(stage):
            self._check_settings(stage, self.read(stage))
            for name in set_aside_after(own, found.state.step):
                self.say(f"{stage}: set aside {own / name}, which is later than resume={self.config.resume}")
        plans[stage] = StagePlan(stage, resume=found, fresh=False)
        return plans

    def _check_settings(self, stage: str, manifest: dict[str, Any]) -> None:
        before, now = manifest.get("settings", {}), settings(self.config, stage)
        for key in _MAY_GROW:
            if key in before and key in now and now[key] > before[key]:
                self.say(f"{stage}: {key} grows from {before[key]} to {now[key]}")
                before = before | {key: now[key]}
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            listed = "; ".join(f"{key}={now.get(key)!r}, began with {before.get(key)!r}" for key in changed[:8])
            raise ValueError(
                f"resume=auto: stage {stage} in {self.root} began with other settings: {listed}. Restore them, choose "
                "another run_root, or start over with resume=never (which replaces what is there)"
            )

    def _check_nothing_later(self, stage: str) -> None:
        """A stage that starts replaces what was made from it: not without being told."""
        later = [s for s in TRAINING if s in _MADE_FROM[stage] and s != stage and self.read(s)]
        if later:
            raise ValueError(
                f"resume=auto: {self.root} holds stage {later[0]} but not {stage}, and running {stage} would replace it: "
                "choose another run_root, or start over with resume=never"
            )

    def _data_there(self) -> bool:
        folder = self.root / "data"
        return bool(self.config.data.train) or all((folder / f"{s}.jsonl").is_file() for s in ("train", "heldout"))

    def _total(self, stage: str) -> int:
        return self.config.sft.steps if stage == "sft" else self.config.algorithm.steps  # 0: given in epochs

    def _write(self, stage: str, manifest: dict[str, Any]) -> None:
        path = self.path(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        aside.write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(aside, path)


def settings(config: RunConfig, stage: str) -> dict[str, Any]:
    """Every key that the stage's outcome depends on, flat, JSON-ready."""
    values = flat(asdict(config))
    chosen = {
        key: value
        for key, value in values.items()
        if any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for prefix in _STAGE_KEYS[stage])
        and key not in _FREE
    }
    if stage in TRAINING and config.data.train:
        chosen["data.train (content)"] = _digest(Path(config.data.train))
    return json.loads(json.dumps(chosen))


def clear(root: Path, stages: list[str]) -> None:
    """Delete what running `stages` from their start replaces."""
    for name in replaced_by(stages):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def plain(values: Any) -> Any:
    """JSON-ready: sets become sorted lists, tuples lists."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, set | frozenset):
        return sorted(values)
    return [plain(v) for v in values] if isinstance(values, list | tuple) else values


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
