"""A group's life: its clip is read, encoded at the freeze boundary, its streams run, and their logs come back.

    read          prepare thread   the clip's frames, and its features if the task brings them
    encode        encode thread    the whole clip, where a worker encodes ahead (`streams.backbone.slices`)
    encode_some   engine thread    elsewhere: a slice between two steps, of one group after the other
    start         engine thread    queue the streams in the engine
    step          engine thread    one engine step; a group whose last stream ends is finished
    drop_late     engine thread    groups past their deadline fail
    fail_running  engine thread    after an error inside a step, which all that run share

No thread, lock or future is handled here: results are returned, and the service answers with them.

Invariants:
* a group's failure is its result, with its cause; ReaderClosedError and StoppedError are no failures and pass through;
* a group that has a result has no stream in the engine, and so no slots, and its clip no place among those that wait;
* a group waits, and its clip counts as waiting, until the first of its streams runs;
* a group is started with features that the weights of that moment make.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from rollout.clips import ClipFeatures, ClipFrames, Encoded, Encoding
from rollout.engine.engine import Engine
from rollout.engine.request import StreamRequest
from rollout.recipe import StreamRecipe
from rollout.self_check import Checked, SelfCheck
from rollout.threads import StoppedError
from streams.backbone import slices
from streams.log.mismatch import LogpDiff, most_telling
from streams.log.record import StreamLog
from streams.memory import make_policy
from streams.messages import GroupPayload, GroupSummary, RolloutTask
from streams.support.doing import doing
from streams.support.meter import Meter
from streams.video.reader import Clip, ReaderClosedError

GroupResult = tuple[GroupSummary, GroupPayload | None]
REPLACED = "the group was asked for again: this copy is not needed"
"""A group is asked for again while it runs if what it was given, the memory of another worker, was lost."""


@dataclass
class Group:
    """A group on its way.

    Attributes:
        future: what the service answers; not touched here.
        began, deadline: times of the monotonic clock, in seconds. The deadline is set when the streams are queued.
        clip, given: set by `read`; given: features that came with the task, in host memory.
        encoding: from when the clip has a place under the budget until the first stream runs.
        encoded: the clip at the boundary, as shipped. features: what its streams embed.
        logs: of the streams that have finished, by stream id. checked: those that were re-scored.
        preempted: times that a stream was given back and began anew.
    """

    task: RolloutTask
    future: Future[GroupResult]
    began: float
    deadline: float = float("inf")
    clip: Clip | None = None
    given: torch.Tensor | None = None
    encoding: Encoding | None = None
    encoded: Encoded | None = None
    features: torch.Tensor | None = None
    logs: dict[str, StreamLog] = field(default_factory=dict)
    checked: list[Checked] = field(default_factory=list)
    preempted: int = 0

    def stream_ids(self) -> list[str]:
        return [f"{self.task.group}/{i}" for i in range(self.task.streams)]


class Groups:
    """The groups of one worker, from their tasks to their results.

    unencoded: what waits for `encode_some`; the engine thread's.
    """

    def __init__(
        self,
        worker: int,
        recipe: StreamRecipe,
        engine: Engine,
        frames: ClipFrames,
        features: ClipFeatures,
        self_check: SelfCheck,
        meter: Meter,
    ) -> None:
        self._worker, self._recipe, self._engine = worker, recipe, engine
        self._frames, self._features = frames, features
        self._self_check, self._meter = self_check, meter
        self.unencoded: deque[Group] = deque()
        self._running: dict[str, Group] = {}
        self._replaced: list[Group] = []  # by a later copy of theirs, and not answered yet

    # --- prepare thread ---------------------------------------------------------------------------------------

    def read(self, group: Group) -> GroupResult | None:
        """Read the group's clip; returns None, or why that failed. Raises ReaderClosedError."""
        task = group.task
        try:
            with doing(f"reads {task.task.video} for group {task.group}"):
                group.clip = self._frames.read(task.task, task.plan)
            if task.features is not None:
                with doing(f"fetches the features of group {task.group}"):
                    group.given = self._features.fetch(task.features)
        except ReaderClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            return self._failed(group, error)
        return None

    # --- encode thread, or else engine thread -----------------------------------------------------------------

    def encode(self, group: Group) -> GroupResult | None:
        """Encode the group's clip, once there is room for it; returns None, or why that failed. Raises StoppedError."""
        try:
            with doing(f"encodes the clip of group {group.task.group}"):
                encoding = self._claim(group)
                assert encoding is not None
                while encoding.made is None:
                    self._features.advance(encoding)
        except StoppedError:
            raise
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            return self._failed(group, error)
        return None

    def _claim(self, group: Group) -> Encoding | None:
        assert group.clip is not None
        group.encoding = group.encoding or self._features.claim(group.task, group.clip, group.given)
        return group.encoding

    # --- engine thread ----------------------------------------------------------------------------------------

    def encode_some(self) -> Iterator[tuple[Group, GroupResult]]:
        """Encode some slices of what waits for it, and start the groups that are complete; yield those that fail.

        Streams that run wait for no more than that, however long the clip. Raises StoppedError.
        """
        patches = 0
        while self.unencoded:
            group = self.unencoded[0]
            try:
                encoding = self._claim(group)
                if encoding is None:
                    return
                while encoding.made is None:
                    # A clip that weights of another version have overtaken once is finished before the next ones come.
                    if patches >= slices.VISIT_PATCHES and not encoding.restarts:
                        return
                    patches += self._features.advance(encoding)
                failed = self.start(group)
            except StoppedError:
                raise
            except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
                failed = self._failed(group, error)
            self.unencoded.popleft()
            if failed is not None:
                yield group, failed

    def outdated(self, group: Group) -> bool:
        """Return whether the group's clip was encoded by weights that were replaced since: it must be encoded anew."""
        if group.encoding is None or not group.encoding.outdated:
            return False
        self._leave(group)
        return True

    def start(self, group: Group) -> GroupResult | None:
        """Queue the streams of a group whose clip is encoded; returns None, or why that failed."""
        assert group.encoding is not None
        group.encoded = group.encoding.made
        assert group.encoded is not None
        if (other := self._running.get(group.task.group)) is not None:
            if group.began < other.began:
                return self._failed(group, RuntimeError(REPLACED))
            self._engine.cancel(set(other.stream_ids()))
            self._replaced.append(self._running.pop(group.task.group))
        try:
            group.features = self._features.embed(group.encoded)
            for request in self._requests(group):
                self._engine.add(request)
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            self._engine.cancel(set(group.stream_ids()))
            return self._failed(group, error)
        # From here, not from the submission: decoding has a deadline of its own, and waiting is nobody's fault.
        group.deadline = time.monotonic() + self._recipe.setup.rollout.group_deadline_s
        self._running[group.task.group] = group
        return None

    def step(self) -> Iterator[tuple[Group, GroupResult]]:
        """Run one engine step and yield every group that it finished.

        One by one: what fails while a later one is checked or parsed does not take the earlier ones with it.
        """
        if not self._engine.busy:
            return
        with self._meter.repeated("engine step"):
            finished = self._engine.step()
        if any(group.encoding is not None for group in self._running.values()):
            for running in self._engine.admission.running:
                self._leave(self._running[_group_of(running.id)])
        for stream_id in self._engine.admission.take_preempted():
            self._running[_group_of(stream_id)].preempted += 1
        for stream in finished:
            name = _group_of(stream.header.stream_id)
            group = self._running[name]
            group.logs[stream.header.stream_id] = stream
            assert group.features is not None
            checked = self._self_check.check(stream, group.features, self._engine.version)
            if checked is not None:
                group.checked.append(checked)
            if len(group.logs) == group.task.streams:
                result = self._result(group)
                del self._running[name]
                yield group, result

    def drop_late(self) -> Iterator[tuple[Group, GroupResult]]:
        """Fail the groups that are past their deadline, or that a later copy has replaced, and yield them."""
        replaced, self._replaced = self._replaced, []
        for group in replaced:
            yield group, self._failed(group, RuntimeError(REPLACED))
        now = time.monotonic()
        for name, group in list(self._running.items()):
            if now > group.deadline:
                self._engine.cancel(set(group.stream_ids()))
                del self._running[name]
                limit = f"rollout.group_deadline_s={self._recipe.setup.rollout.group_deadline_s:g}"
                yield group, self._failed(group, TimeoutError(f"the group was not finished within {limit}"))

    def fail_running(self, error: Exception) -> list[tuple[Group, GroupResult]]:
        """Fail every group that runs, and free all slots. `error` was raised inside a step, which they share."""
        self._engine.drop_all()
        failed = [(group, self._failed(group, error)) for group in self._running.values()]
        self._running.clear()
        return failed

    def _leave(self, group: Group) -> None:
        """End the group's wait, if it still waits: its streams run, or it is over."""
        encoding, group.encoding = group.encoding, None
        if encoding is not None:
            self._features.leave(encoding)

    def _requests(self, group: Group) -> Iterator[StreamRequest]:
        """Yield the group's streams: the same turns and features, a seed, a policy and a log of their own."""
        task, setup = group.task, self._recipe.setup
        assert group.clip is not None
        assert group.features is not None
        layout = self._recipe.layout(empty_thoughts=task.empty_thoughts)
        memory = task.memory or setup.memory
        version = self._engine.version if setup.boundary.vision_trains else None
        turns = self._recipe.turns(task.task, task.plan, group.clip, layout, version)
        for stream_id in group.stream_ids():
            yield StreamRequest(
                header=self._recipe.header(stream_id, task.task.id, memory, layout, task.temperature),
                turns=turns,
                features=tuple(group.features),
                policy=make_policy(memory),
                layout=layout,
                patch_seconds=self._recipe.patch_seconds(task.plan),
            )

    def _result(self, group: Group) -> GroupResult:
        self._leave(group)
        assert group.clip is not None
        assert group.encoded is not None
        layout = self._recipe.layout(empty_thoughts=group.task.empty_thoughts)
        logs = tuple(group.logs[stream_id] for stream_id in group.stream_ids())
        summary = GroupSummary(
            group=group.task.group,
            task_id=group.task.task.id,
            worker=self._worker,
            turns=tuple(layout.parse_turns(stream) for stream in logs),
            targets=tuple(stream.targets_by_turn for stream in logs),
            oldest_version=min(stream.oldest_version for stream in logs),
            versions=tuple(sorted({version for stream in logs for version in stream.versions})),
            tokens=sum(int(stream.sampled.sum()) for stream in logs),
            log_tokens=sum(len(stream) for stream in logs),
            evicted_tokens=sum(stream.evicted_tokens for stream in logs),
            preempted=group.preempted,
            seconds=time.monotonic() - group.began,
            clip_seconds=self._recipe.clip_seconds(group.task.task, group.task.plan),
            monitor=LogpDiff.merge([checked.mismatch for checked in group.checked]),
            off=most_telling([checked.outlier for checked in group.checked]),
            features=group.encoded.reference,
            feature_bytes=group.encoded.tensor.nbytes,
        )
        if group.encoded.reference is not None:
            return summary, GroupPayload(logs, self._recipe.setup.boundary.ships, group.encoded.reference)
        return summary, GroupPayload(logs, "frames", group.clip.frames)

    def _failed(self, group: Group, error: Exception) -> GroupResult:
        self._leave(group)
        task = group.task
        clip_seconds = self._recipe.clip_seconds(task.task, task.plan)
        return failure(self._worker, task.group, task.task.id, clip_seconds, group.began, error)


def _group_of(stream_id: str) -> str:
    return stream_id.rsplit("/", 1)[0]


def failure(worker: int, group: str, task_id: str, clip_seconds: float, began: float, error: Exception) -> GroupResult:
    """Return the result of a task that failed. began: time of the monotonic clock, in seconds."""
    summary = GroupSummary(
        group=group,
        task_id=task_id,
        worker=worker,
        seconds=time.monotonic() - began,
        clip_seconds=clip_seconds,
        failed=f"{type(error).__name__}: {error}",
    )
    return summary, None
