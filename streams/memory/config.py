"""`memory=NAME` of the Hydra config: which policy, with which knobs; or a user's own.

A policy's knobs are the parameters of its constructor, named as the fields of MemoryConfig.

Invariants:
* what cannot work is refused by its key when the config is made;
* so is a user's policy that is named but not chosen;
* a knob that the policy does not take is ignored, and `notes` reports it: a preset's knob may outlive a change of policy
  on the command line.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any

from streams.layout.lanes import Lanes
from streams.memory.boundary import check_contiguous
from streams.memory.policy import CONTIGUOUS, NATIVE, POSITIONS, MemoryPolicy
from streams.memory.random_tokens import RandomTokens
from streams.memory.sink_window import SinkWindow
from streams.memory.text_memory import TextMemory
from streams.memory.visual_budget import VisualBudget
from streams.memory.windows import Full, Rcsm, RecentFrames
from streams.support import plugins as targets

POLICIES: dict[str, type[MemoryPolicy]] = {
    "full": Full,
    "rcsm": Rcsm,
    "recent_frames": RecentFrames,
    "sink_window": SinkWindow,
    "text_memory": TextMemory,
    "visual_budget": VisualBudget,
    "random": RandomTokens,
}
CUSTOM = "custom"


@dataclass(frozen=True)
class MemoryConfig:
    """The memory policy and its knobs. Which policy takes which knob: `docs/memory.md`."""

    name: str = "rcsm"
    """Policy: `full`, `rcsm`, `recent_frames`, `sink_window`, `text_memory`, `visual_budget`, `random`, or
    `custom` = the class in `memory.target`.
    """
    window: int = 20
    """Video turns whose video stays, the one being watched included (W)."""
    text_window: int = 0
    """Turns whose text stays. `rcsm`: 0 = all of them."""
    sink_tokens: int = 0
    """`sink_window`: first tokens that are kept of generated text older than `memory.text_window`."""
    tail_tokens: int = 0
    """`sink_window`: last tokens that are kept of generated text older than `memory.text_window`."""
    video_tokens: int = 0
    """`visual_budget`: video tokens that the latest chunks may take."""
    seed: int = 0
    """`random`: seed of the draws."""
    rate: float = 0.1
    """`random`: probability that a token leaves at a turn, in [0, 1]."""
    positions: str = NATIVE
    """`native` = a token keeps its position, `contiguous` = what stays is re-indexed once per turn
    (`sink_window`, or a policy of yours with regions).
    """
    target: str = ""
    """`custom`: your MemoryPolicy, as `package.module:Class`."""
    args: dict[str, Any] = field(default_factory=dict)
    """`custom`: arguments of your policy's constructor, by name."""

    def __post_init__(self) -> None:
        if self.name not in (*POLICIES, CUSTOM):
            raise ValueError(f"memory.name={self.name!r} is not one of {', '.join(sorted(POLICIES))}, {CUSTOM}")
        if self.positions not in POSITIONS:
            raise ValueError(f"memory.positions={self.positions!r} is not one of {', '.join(POSITIONS)}")
        if self.window < 1:
            raise ValueError(f"memory.window={self.window} must be at least 1 (the chunk being watched)")
        for key in ("text_window", "sink_tokens", "tail_tokens", "video_tokens", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"memory.{key}={getattr(self, key)} must not be negative")
        if not (math.isfinite(self.rate) and 0 <= self.rate <= 1):
            raise ValueError(f"memory.rate={self.rate} must lie in [0, 1]")
        if self.name == CUSTOM and ":" not in self.target:
            raise ValueError(
                f"memory.target={self.target!r} with memory.name={CUSTOM}: name your policy as package.module:Class"
            )
        if self.name != CUSTOM and self.target:
            raise ValueError(
                f"memory.target={self.target!r} with memory.name={self.name}: your policy would not be used; set "
                f"memory.name={CUSTOM} as well, or leave memory.target out"
            )
        make_policy(self)

    @property
    def takes(self) -> tuple[str, ...]:
        """The knobs that the policy takes, in its own order."""
        return ("target", "args") if self.name == CUSTOM else tuple(inspect.signature(POLICIES[self.name]).parameters)

    def notes(self) -> list[str]:
        """Return what is set but not taken by the policy; printed at start."""
        idle = [
            f"memory.{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("name", "positions", *self.takes)
            and getattr(self, f.name) != (f.default if f.default_factory is MISSING else f.default_factory())
        ]
        return [f"note: memory.name={self.name} does not take {', '.join(idle)}"] if idle else []

    def recent(self) -> MemoryConfig:
        """Return the baseline to compare with: only the latest turns, as many as this policy keeps video of."""
        own = make_policy(self).window
        return MemoryConfig("recent_frames", self.window if own is None else max(1, int(own)))

    @property
    def words(self) -> str:
        """The name and what stays, for people."""
        name = self.name if self.name != CUSTOM else f"{self.target}({_listed(self.args)})"
        positions = "" if self.positions == NATIVE else f"{self.positions} positions"
        return ", ".join(filter(None, (name, make_policy(self).words, positions)))


def check_args_taken(config: MemoryConfig) -> None:
    """Raise ValueError for arguments of a policy that takes none.

    Called once a checkpoint's settings are applied: where the checkpoint brings the policy, the command line may override
    single arguments.
    """
    if config.name != CUSTOM and config.args:
        raise ValueError(
            f"memory.args={{{_listed(config.args)}}} with memory.name={config.name}, which takes its knobs as memory.KNOB "
            f"({', '.join(config.takes) or 'it has none'}): set memory.name={CUSTOM} and memory.target, or leave them out"
        )


def make_policy(config: MemoryConfig) -> MemoryPolicy:
    """Return the policy of one stream. Raises ValueError, with the config key, for what cannot work."""
    policy = _construct(config)
    if config.positions == CONTIGUOUS:
        check_contiguous(policy, config.name)
        policy.positions = CONTIGUOUS
    return policy


def _construct(config: MemoryConfig) -> MemoryPolicy:
    if config.name != CUSTOM:
        knobs = {knob: getattr(config, knob) for knob in config.takes}
        policy: MemoryPolicy = targets.construct(POLICIES[config.name], knobs, "memory")
        return policy
    factory = targets.load(config.target, "memory")
    if not (isinstance(factory, type) and issubclass(factory, MemoryPolicy)):
        raise ValueError(
            f"memory.target={config.target!r} is no policy: derive a class from streams.memory.MemoryPolicy"
        )
    targets.check_params(factory, config.args, "memory.args")
    made: MemoryPolicy = targets.construct(factory, config.args, "memory.args")
    _check_own(made, config.target)
    return made


def _check_own(policy: MemoryPolicy, target: str) -> None:
    """Raise ValueError if an attribute that is read of a user's policy has the wrong type."""
    for name, kinds, what in (
        ("window", Real | None, "a number of turns or None"),
        ("text_window", Real | None, "a number of turns or None"),
        ("lanes", Lanes, "a streams.memory.Lanes"),
        ("words", str, "a text: a property that returns one"),
    ):
        try:
            value = getattr(policy, name)
        except Exception as error:  # named boundary: a user's code
            raise ValueError(f"memory.target={target!r}: its {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(value, kinds):
            raise ValueError(f"memory.target={target!r}: its {name} is {value!r}; it must be {what}")


def knobs(config: MemoryConfig) -> tuple[tuple[str, int | float | str], ...]:
    """Return the policy's settings as a log header has them."""
    positions = () if config.positions == NATIVE else (("positions", config.positions),)
    if config.name == CUSTOM:
        return (("target", config.target), ("args", json.dumps(config.args, sort_keys=True)), *positions)
    return (*((knob, getattr(config, knob)) for knob in config.takes), *positions)


def _listed(args: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in args.items())
