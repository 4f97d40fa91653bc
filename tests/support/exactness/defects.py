"""Defects that real systems have had, planted in the real engine or in what the real learner is given.

Each acts on the general mechanism, so that it applies to any policy: a log whose expiry is wrong, a log
written again under wrong knobs, an engine that forwards END too late, a learner without the ban list. A bar that a planted
defect also passes would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rollout.engine.engine import Engine
from rollout.engine.request import Stream, StreamRequest
from rollout.engine.step_plan import StepPlan
from streams.backbone.backbone import Backbone
from streams.log.record import GENERATED, NEVER, Kind, StreamLog
from streams.memory import MemoryConfig, make_policy
from streams.writing.writer import StreamWriter
from tests.support.exactness.backbones import with_ban_list
from tests.support.exactness.streams import differences, run

WINDOW_KNOBS = ("window", "text_window", "sink_tokens", "tail_tokens", "video_tokens")
"""Knobs that bound how much stays. A budget is off by one token, the size of the smallest chunk."""

_NOTHING_LEAVES = "nothing leaves, the mask is causal"
_NO_WINDOW = "what leaves is drawn by luck: there is no window, and no turn's start, that could be meant"
NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "full": {
        "causal_mask": _NOTHING_LEAVES,
        "window_off_by_one": _NOTHING_LEAVES,
        "turn_start_at_video": _NOTHING_LEAVES,
        "late_end": _NOTHING_LEAVES,
    },
    "text_memory": {"late_end": "nobody looks at a turn's lane once it is over, END included"},
    "random": {"window_off_by_one": _NO_WINDOW, "turn_start_at_video": _NO_WINDOW, "late_end": _NO_WINDOW},
}
"""Policy -> defect -> why it changes neither mask nor vocabulary there."""


class _LateEndPlan(StepPlan):
    def _end_turn(self, stream: Stream) -> None:
        """Leave END to be forwarded with the next turn."""


class LateEnd(Engine):
    """The published off-by-one: END rides in the next turn's prefill, after its eviction."""

    def _plan(self) -> StepPlan:
        return _LateEndPlan(self.version)


def causal(log: StreamLog) -> StreamLog:
    """Return the log as a plain causal mask reads it: nothing was ever evicted, and there is one lane."""
    return replace(log, expiry=np.full_like(log.expiry, NEVER), lane=np.zeros_like(log.lane))


def _starts(log: StreamLog) -> list[int]:
    """Return the index of each turn's first prefilled token."""
    return [int(np.flatnonzero(log.turn == turn)[0]) for turn in range(log.num_turns)]


def turn_start_at_video(log: StreamLog) -> StreamLog:
    """Evict at the first video token of a turn: what is prefilled before it still sees the evicted tokens."""
    expiry = log.expiry.copy()
    generated = np.isin(log.kind, GENERATED)
    for turn in range(1, log.num_turns):
        video = np.flatnonzero((log.turn == turn) & (log.kind == Kind.VIDEO))
        if len(video):
            ended = np.flatnonzero((log.turn == turn - 1) & generated)[-1]
            expiry[(log.expiry > ended) & (log.expiry <= video[0])] = video[0]
    return replace(log, expiry=expiry)


def a_turn_late(log: StreamLog) -> StreamLog:
    """Evict every token one turn late."""
    starts = np.array([*_starts(log), NEVER, NEVER])
    left = log.expiry < len(log)
    expiry = log.expiry.copy()
    expiry[left] = starts[np.searchsorted(starts, log.expiry[left]) + 1]
    return replace(log, expiry=expiry)


def written_again(backbone: Backbone, log: StreamLog, request: StreamRequest, memory: MemoryConfig) -> StreamLog:
    """Write the log's tokens again under `memory`, as a learner would that derives its mask instead of reading the record."""
    writer = StreamWriter(log.header, request.layout, make_policy(memory), backbone.cursor(request.patch_seconds))
    generated = np.isin(log.kind, GENERATED)
    for turn in range(log.num_turns):
        writer.begin_turn(request.turns[turn], int(log.version[0]))
        for i in np.flatnonzero(generated & (log.turn == turn)):
            writer.extend_generated(
                log.ids[i : i + 1],
                int(log.version[i]),
                logps=log.behaviour_logp[i : i + 1],
                target=bool(log.target[i]),
            )
    again = writer.finish()
    if not np.array_equal(again.ids, log.ids):
        raise ValueError(f"stream {log.header.stream_id}: written again, it has other tokens")
    return again


def off_by_one(memory: MemoryConfig) -> list[MemoryConfig]:
    """Return variants of `memory`, each with one of its knobs one too small or too large."""
    taken = [knob for knob in WINDOW_KNOBS if knob in memory.takes and getattr(memory, knob)]
    return [replace(memory, **{knob: getattr(memory, knob) + by}) for knob in taken for by in (-1, 1)]


Plant = Callable[[Backbone, MemoryConfig, list[StreamRequest], list[StreamLog]], float]


def _causal_mask(b: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]) -> float:
    return _largest(b, [causal(log) for log in logs], requests)


def _window(b: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]) -> float:
    """Plant the least noticed of all windows that are off by one; without such a knob, evict everything one turn late."""
    pairs = list(zip(logs, requests, strict=True))
    variants = [[written_again(b, log, r, wrong) for log, r in pairs] for wrong in off_by_one(memory)]
    return float(np.min([_largest(b, again, requests) for again in variants or [[a_turn_late(log) for log in logs]]]))


def _video_start(b: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]) -> float:
    return _largest(b, [turn_start_at_video(log) for log in logs], requests)


def _late_end(b: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]) -> float:
    return _largest(b, run(b, requests, engine_type=LateEnd), requests)


def _no_ban_list(b: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]) -> float:
    return _largest(with_ban_list(b, ()), logs, requests)


DEFECTS: dict[str, Plant] = {
    "causal_mask": _causal_mask,
    "window_off_by_one": _window,
    "turn_start_at_video": _video_start,
    "late_end": _late_end,
    "no_ban_list": _no_ban_list,
}


def planted(
    backbone: Backbone, memory: MemoryConfig, requests: list[StreamRequest], logs: list[StreamLog]
) -> dict[str, float | None]:
    """Return the largest difference under each defect; None where it does not apply (`NOT_APPLICABLE` says why)."""
    skipped = NOT_APPLICABLE.get(memory.name, {})
    return {
        name: None if name in skipped else plant(backbone, memory, requests, logs) for name, plant in DEFECTS.items()
    }


def _largest(backbone: Backbone, logs: list[StreamLog], requests: list[StreamRequest]) -> float:
    return float(np.max(differences(backbone, logs, requests)))
