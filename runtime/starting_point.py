"""What a job starts from: resolved once, when it is launched, and passed to whoever needs it.

Invariants:
* its paths are those at launch; checkpoints that this job makes are looked up when they are needed;
* making a StartingPoint reads no file of a checkpoint: `check` finds and names what is wrong with one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conf.schema import RunConfig
from conf.streaming import apply_streaming, overridden_keys, read_streaming
from runtime.store.manifests import StagePlan, replaced_by
from streams.checkpoint.families import FAMILIES, Family, family_of_hub_id
from streams.checkpoint.folder import is_hub_id, model_type, resolve_checkpoint, token_side
from streams.checkpoint.weights import check_weights

UNSET = ("", "auto", "best")
"""Values of the keys below that name no checkpoint of the user's."""


def named_checkpoints(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """Return (config key, value) of the checkpoints that the user named."""
    keys = (
        ("model.path", config.model.path),
        ("algorithm.init", config.algorithm.init),
        ("eval.checkpoint", config.eval.checkpoint),
        ("algorithm.reference", config.algorithm.reference),
    )
    return tuple((key, value) for key, value in keys if value not in UNSET)


@dataclass(frozen=True)
class StartingPoint:
    """Where a job starts, and where each of its stages does.

    Attributes:
        config: as it was launched; its own settings may still give way to those of the checkpoint (`respected`).
        named: (config key, value) of the checkpoints that the user named.
        base: (config key, folder) of the checkpoint whose streaming.json the job must respect; None if there is none.
        folder: of the model that the job starts from; None while there is none: a tiny one yet to be built, a hub id.
    """

    config: RunConfig
    named: tuple[tuple[str, str], ...]
    base: tuple[str, Path] | None
    folder: Path | None

    @classmethod
    def of(cls, config: RunConfig) -> StartingPoint:
        """Resolve the starting point of a configuration."""
        base = _base(config)
        named = [base[1]] if base else []
        named += [Path(config.model.path)] if config.model.path else []
        folder = next((path for path in named if (path / "config.json").is_file()), None)
        return cls(config, named_checkpoints(config), base, folder)

    @classmethod
    def at(cls, config: RunConfig, checkpoint: Path) -> StartingPoint:
        """Start from a folder that is known, whatever the configuration and its run_root say."""
        return cls(config, named_checkpoints(config), ("model.path", checkpoint), checkpoint)

    # --- the model, before it is loaded -----------------------------------------------------------------------

    @cached_property
    def token_side(self) -> int:
        """Return the pixels along one side of a video token. A hub id that is not at hand yet counts as its family's."""
        if self.folder is not None:
            return token_side(self.folder)
        model = self.config.model
        return family_of_hub_id(model.path).token_side if model.path else model.tiny.token_side

    @cached_property
    def family(self) -> Family | None:
        """Return the model's family; None if it cannot be told yet, or is none that can be trained."""
        if self.folder is not None:
            return FAMILIES.get(model_type(self.folder))
        return None if self.config.model.path else self.config.model.tiny.family

    @property
    def writes_time(self) -> bool:
        """Whether the model writes the time of a chunk as text; what cannot be told yet counts as no."""
        return self.family is not None and self.family.timestamps

    # --- what must hold before anything starts ----------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError, with the key, for a checkpoint that cannot be started from."""
        for key, value in self.named:
            folder = Path(value)
            if not folder.is_dir() and not is_hub_id(value):
                raise FileNotFoundError(f"{key}={value}: no such folder, and not a hub id of the form owner/name")
            if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "hf" / "config.json").is_file():
                raise ValueError(f"{key}={value} is a whole checkpoint: name its export, {key}={folder / 'hf'}")
            if folder.is_dir():
                _check_folder(key, folder)
        config = self.config
        unset = config.eval.checkpoint == "auto" and not config.model.path
        if config.job.stages == ["eval"] and unset and not own_checkpoints(config.root):
            raise FileNotFoundError(
                f"job=eval: no checkpoint under {config.root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
            )
        if config.eval.checkpoint == "best" and "rl" not in config.job.stages and not best_export(config.root).is_dir():
            raise FileNotFoundError(
                f"eval.checkpoint=best: there is no {best_export(config.root)}; train with eval.every=N first"
            )

    def check_nothing_needed_is_replaced(self, plans: Mapping[str, StagePlan]) -> None:
        """Raise ValueError if the run would replace a checkpoint that it starts from."""
        config = self.config
        fresh = [stage for stage in config.job.stages if stage not in plans or plans[stage].fresh]
        for key, value in self.named:
            source = Path(value).resolve()
            for name in replaced_by(fresh):
                replaced = (config.root / name).resolve()
                if source == replaced or replaced in source.parents:
                    raise ValueError(
                        f"{key}={value} lies in {replaced}, which job={config.job.name} replaces: copy it elsewhere or "
                        "choose another run_root"
                    )

    def check_cold_start(self, plans: Mapping[str, StagePlan]) -> None:
        """Raise ValueError if RL is to begin and what the stage before makes is not there, nor made in this job."""
        rl, sft = plans.get("rl"), plans.get("sft")
        if rl and rl.fresh and self.config.algorithm.init == "auto" and (sft is None or sft.skip):
            cold_start(self.config.root)

    def respected(
        self, overrides: Collection[str], say: Callable[[str], None], warn: Callable[[str], None]
    ) -> RunConfig:
        """Return the configuration with what the checkpoint says about how it runs (see conf.streaming)."""
        if self.base is None:
            return self.config
        key, path = self.base
        applied = apply_streaming(self.config, read_streaming(path), overridden_keys(overrides))
        if applied.conflicts and key == "resume":
            raise ValueError(
                f"resume={self.config.resume}: {'; '.join(applied.conflicts)}. A stage is resumed as it was begun: drop "
                "the override, or start a new stage with algorithm.init"
            )
        if applied.taken:
            say(f"settings from {path}: {', '.join(applied.taken)}")
        for conflict in applied.conflicts:
            warn(f"{conflict}; the override is used")
        return applied.config

    # --- what the stages start from, when they do -------------------------------------------------------------

    def of_rl(self, initial_model: Callable[[], Path]) -> Path:
        """Return the weights that RL begins with. Raises ValueError or FileNotFoundError."""
        given = self.config.algorithm.init
        if given != "auto":
            return resolve_checkpoint(given, "algorithm.init")
        return cold_start(self.config.root.resolve()) or initial_model()

    def reference(self, origin: str | None, initial_model: Callable[[], Path]) -> Path:
        """Return what RL's KL is measured against: where RL started, also after a resume.

        origin: the checkpoint of another run that this one went on from, if it did. Raises ValueError or FileNotFoundError.
        """
        given = self.config.algorithm.reference
        if given != "auto":
            return resolve_checkpoint(given, "algorithm.reference")
        if origin and self.config.algorithm.init == "auto":
            return reference_of_branch(Path(origin)) or initial_model()
        return self.of_rl(initial_model)

    def evaluated(self, label: Callable[[str], str]) -> dict[str, Path]:
        """Return folder by name of what is evaluated, in that order. label: names a checkpoint that the user named.

        Raises ValueError if there is none, FileNotFoundError for a hub id that cannot be had.
        """
        config, root = self.config, self.config.root.resolve()
        if config.eval.checkpoint == "best":
            return {"best": best_export(root)}
        if config.eval.checkpoint != "auto":
            return {label(config.eval.checkpoint): resolve_checkpoint(config.eval.checkpoint, "eval.checkpoint")}
        if found := own_checkpoints(root):
            return found
        if config.model.path:
            return {label(config.model.path): resolve_checkpoint(config.model.path)}
        raise ValueError(
            f"job=eval: no checkpoint under {root / 'checkpoints'}; run job=sft first or set eval.checkpoint"
        )


def own_checkpoints(root: Path) -> dict[str, Path]:
    """Return the exports that the stages of this run_root have finished, in the order of the stages."""
    made = {stage: root / "checkpoints" / stage / "final" / "hf" for stage in ("sft", "rl")}
    return {stage: path for stage, path in made.items() if path.is_dir()}


def best_export(root: Path) -> Path:
    """Return where RL keeps the export that the evaluations while training liked best."""
    return root / "checkpoints" / "rl" / "best" / "hf"


def cold_start(root: Path) -> Path | None:
    """Return the export that RL in this run_root starts from; None if it has had no cold start.

    Raises ValueError if that one is not there: RL would begin with weights that know nothing.
    """
    made = own_checkpoints(root).get("sft")
    if made is None and (root / "stages" / "sft.json").is_file():
        raise ValueError(
            f"{root} has begun stage sft, but {root / 'checkpoints' / 'sft' / 'final'}, which RL starts from, is not there: "
            "finish it with job=sft (or job=all) and resume=auto, or set algorithm.init to a checkpoint folder"
        )
    return made


def reference_of_branch(origin: Path) -> Path | None:
    """Return what RL started from in the run_root of the checkpoint `origin`; None if from the run's own model."""
    stage = origin.parent
    root = stage.parent.parent
    if stage.parent.name != "checkpoints" or not (root / "stages").is_dir():
        raise ValueError(
            f"algorithm.reference=auto is what RL started from, and the run_root of {origin} does not tell: set "
            "algorithm.reference to that checkpoint's folder"
        )
    return cold_start(root)


def _check_folder(key: str, folder: Path) -> None:
    """Raise ValueError if weights are missing. Hub ids are checked once they are resolved (runtime.run)."""
    try:
        check_weights(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{key}: {error}") from error


def _base(config: RunConfig) -> tuple[str, Path] | None:
    """Return (config key, folder) of the checkpoint whose streaming.json the job must respect, or None."""
    if config.resume not in ("auto", "never"):
        return "resume", Path(config.resume) / "hf"
    stages = config.job.stages
    if "sft" in stages or stages == ["data"]:
        return None
    chosen = config.algorithm.init if "rl" in stages else config.eval.checkpoint
    key = "algorithm.init" if "rl" in stages else "eval.checkpoint"
    if chosen not in ("auto", "best"):
        path = Path(chosen)
        return (key, path) if path.is_dir() else None
    if chosen == "best":
        return key, best_export(config.root)
    own = own_checkpoints(config.root)
    if "rl" in stages:
        own.pop("rl", None)
    if own:
        return key, list(own.values())[-1]
    path = Path(config.model.path)
    return ("model.path", path) if config.model.path and path.is_dir() else None
