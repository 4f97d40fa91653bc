"""The rollout worker without Ray: reads clips, feeds the engine, swaps weights, answers with logs.

Two threads: `prepare` reads and lays out (a slow file delays no running stream), `engine` encodes, steps
and swaps. Invariants: only the engine thread touches backbone and engine; new weights are copied in between two steps;
one task's failure is that task's result, with its cause, and never the worker's end; every future that was handed out is
settled: what `close` leaves undone ends in ServiceClosedError, which is no task's failure.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rollout.config import SELF_CHECK_HEAD
from rollout.demonstrations import write_demonstration
from rollout.engine.engine import Engine, StreamRequest
from rollout.engine.sampler import stream_seed
from rollout.promises import Promises
from rollout.setup import WorkerSetup
from rollout.staging import StagedWeights
from streams.backbone.backbone import Backbone, to_array, to_tensor
from streams.backbone.kernel_choice import choose_learner_attention, choose_vision_attention
from streams.layout.layout import Layout
from streams.log.mismatch import LogpDiff, OffToken, most_telling
from streams.log.record import LogHeader, StreamLog
from streams.memory import CONTIGUOUS, MemoryConfig, knobs, make_policy
from streams.messages import GroupPayload, GroupSummary, RolloutTask, ScriptTask, SwapReport, WeightsUpdate, WorkerStats
from streams.scoring.logprobs import behaviour_differences
from streams.support.byte_cache import ByteBudgetCache
from streams.support.meter import Meter
from streams.task import StreamTask
from streams.video.reader import Clip, ClipReader, ReaderClosedError
from streams.writing.inputs import clip_key, turn_inputs
from streams.writing.writer import StreamWriter, check_timestamps_kept

log = logging.getLogger("sightline.rollout")

GroupResult = tuple[GroupSummary, GroupPayload | None]
IDLE_WAKE_S = 5.0
"""How long the engine thread sleeps at most when it has nothing to do; work wakes it at once."""
PREPARE_JOIN_S = 10.0
ENGINE_JOIN_S = 30.0
"""How long `close` waits for each thread: for the prepare thread to let go of its clip, for an engine step to end."""


@dataclass
class _Group:
    """encoded: the clip at the freeze boundary, as kept and shipped; features: what its streams embed."""

    task: RolloutTask
    future: Future[GroupResult]
    began: float
    deadline: float = float("inf")
    clip: Clip | None = None
    encoded: torch.Tensor | None = None
    encoded_ref: Any = None
    features: torch.Tensor | None = None
    layout: Layout | None = None
    logs: dict[str, StreamLog] = field(default_factory=dict)
    monitor: list[LogpDiff] = field(default_factory=list)
    off: list[OffToken | None] = field(default_factory=list)

    def stream_ids(self) -> list[str]:
        return [f"{self.task.group}/{i}" for i in range(self.task.streams)]


@dataclass(frozen=True)
class ServiceLimits:
    """cache_mb: frames and features kept, each. deadline_s: of one group, from its first step."""

    cache_mb: int = 256
    deadline_s: float = 120.0


class RolloutService:
    """See the module docstring. put: stores an array and returns a reference to ship; get: resolves one."""

    def __init__(
        self,
        worker: int,
        setup: WorkerSetup,
        limits: ServiceLimits,
        put: Callable[[np.ndarray], Any],
        get: Callable[[Any], np.ndarray],
    ) -> None:
        self.worker = worker
        self.setup = setup
        self.limits = limits
        self._put, self._get = put, get
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vision = choose_vision_attention(setup.vision_attention, device, setup.dtype)
        self.meter = Meter()
        with self.meter.phase("load"):
            self.backbone = Backbone.load(
                setup.checkpoint,
                setup.layout,
                dtype=getattr(torch, setup.dtype),
                device=device,
                vision_attention=vision.name,
            )
        self.engine = Engine(self.backbone, setup.kv_slots, setup.max_streams, setup.attention)
        # The learner may be asked for a kernel that its device has and this one lacks.
        self._scoring = choose_learner_attention(setup.scoring_attention if device == "cuda" else "auto", device)
        kernels = (self.engine.attention, vision, self._scoring)
        log.info("worker %d: attention %s, vision attention %s, self-check %s", worker, *kernels)
        self.engine.version = setup.version
        try:
            policy = make_policy(setup.memory)
        except ValueError as error:  # the driver has made the same: what differs is what Python finds here
            raise ValueError(
                f"{error} (in rollout worker {worker}: a policy's module must be importable there, too)"
            ) from error
        check_timestamps_kept(self.backbone.layout, policy)
        if policy.positions == CONTIGUOUS:  # refused, and its room taken, before any group
            self.engine.hold_unrotated_keys()
        self._layouts = {
            empty: self.backbone.layout.with_config(
                replace(setup.layout, force_empty_thoughts=empty or setup.layout.force_empty_thoughts)
            )
            for empty in (False, True)
        }
        image = self.backbone.image
        self._reader = ClipReader(setup.video, image.patch_size, image.merge_size)
        self._frames: ByteBudgetCache[Clip] = ByteBudgetCache(limits.cache_mb * 2**20)
        self._features: ByteBudgetCache[tuple[torch.Tensor, Any]] = ByteBudgetCache(limits.cache_mb * 2**20)
        self._prepare = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._wake = threading.Condition()
        self._inbox: deque[_Group] = deque()
        self._swaps: deque[tuple[StagedWeights, float, Future[SwapReport]]] = deque()
        self._groups: dict[str, _Group] = {}
        self._promises = Promises(f"rollout worker {worker}")
        self._preparing = threading.Lock()  # held by the prepare thread while it works
        self._stopping = False
        self._finished_streams = 0
        self._clips_encoded = 0
        self._busy_s = self._busy_at_swap = 0.0
        self._born = self._swapped_at = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # --- called from any thread -------------------------------------------------------------------------------

    def submit(self, task: RolloutTask) -> Future[GroupResult]:
        """Run one group; the future holds its summary and payload, or a summary that says why it failed.

        Raises ServiceClosedError; so does the future of a group that `close` cut off.
        """
        future = self._promises.make(f"group {task.group}")
        self._in_prepare_thread(self._prepare_group, _Group(task, future, time.monotonic()))
        return future

    def script(self, task: ScriptTask) -> Future[GroupResult]:
        """Lay out one demonstration as a log with its frames. Raises ServiceClosedError, as `submit` does."""
        future = self._promises.make(f"the demonstration of {task.group}")
        self._in_prepare_thread(self._answer_script, task, future)
        return future

    def stage(self, update: WeightsUpdate, fetch_s: float) -> Future[SwapReport]:
        """Unpack a fetched version and have it swapped in between two steps. Raises ServiceClosedError, as `submit` does."""
        staged = StagedWeights.stage(update, self.backbone, self.setup.staging)
        future = self._promises.make(f"the swap to version {update.version}")
        with self._wake:
            self._swaps.append((staged, fetch_s, future))
            self._wake.notify()
        return future

    def _in_prepare_thread(self, work: Callable[..., None], *given: Any) -> None:
        with self._wake:
            if self._stopping:  # `close` came in between, and settles what is owed
                return
            self._prepare.submit(self._run, work, *given)

    def _run(self, work: Callable[..., None], *given: Any) -> None:
        with self._preparing:
            work(*given)

    def stats(self) -> WorkerStats:
        return WorkerStats(
            worker=self.worker,
            busy_s=self._busy_s,
            total_s=time.monotonic() - self._born,
            sampled_tokens=self.engine.stats.sampled_tokens,
            engine_steps=self.engine.stats.steps,
            clips_encoded=self._clips_encoded,
        )

    def close(self) -> None:
        """End both threads and the decode process; whatever is not finished ends in ServiceClosedError.

        Ends a read under way, waits for a step under way. May be called from any thread and more than once.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._promises.refuse()
        # First of all: it is what the prepare thread may wait for longest.
        self._reader.close()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        if self._preparing.acquire(timeout=PREPARE_JOIN_S):
            self._preparing.release()
        else:
            log.warning("worker %d: the prepare thread still works %g s after close", self.worker, PREPARE_JOIN_S)
        self._thread.join(timeout=ENGINE_JOIN_S)
        if self._thread.is_alive():
            log.warning("worker %d: an engine step still runs %g s after close", self.worker, ENGINE_JOIN_S)
        self._promises.cut_off()

    # --- prepare thread -----------------------------------------------------------------------------------------

    def _prepare_group(self, group: _Group) -> None:
        task = group.task
        try:
            group.layout = self._layouts[task.empty_thoughts]
            group.clip = self._read(task.task, task.turns)
            if task.features is not None:
                group.encoded = to_tensor(self._get(task.features)).to(self.backbone.device)
                group.encoded_ref = task.features
        except ReaderClosedError:
            return  # `close` settles the group
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            self._fail(group, error)
            return
        with self._wake:
            self._inbox.append(group)
            self._wake.notify()

    def _read(self, task: Any, turns: int) -> Clip:
        key = clip_key(task, turns)
        clip = self._frames.get(key)
        if clip is None:
            clip = self._reader.read_task(task, turns)
            self._frames.put(key, clip, clip.nbytes)
        return clip

    def _answer_script(self, task: ScriptTask, future: Future[GroupResult]) -> None:
        try:
            result = self._write_script(task)
        except ReaderClosedError:
            return  # `close` settles the demonstration
        self._promises.settle(future, result)

    def _write_script(self, task: ScriptTask) -> GroupResult:
        """Raises ReaderClosedError."""
        began = time.monotonic()
        try:
            clip = self._read(task.task, len(task.script))
            layout = self._layouts[False]
            writer = StreamWriter(
                self._header(task.group, task.task.id, self.setup.memory, layout, 1.0),
                layout,
                make_policy(self.setup.memory),
                self._cursor(task.task),
            )
            chunk = self.setup.video.chunk_seconds_of(task.task)
            turns = turn_inputs(task.task, clip, layout, chunk, self.backbone.image.merge_size)
            stream = write_demonstration(writer, turns, task, self.setup.version)
        except ReaderClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            return self._failure(task.group, task.task.id, 0.0, began, error), None
        summary = GroupSummary(
            group=task.group,
            task_id=task.task.id,
            worker=self.worker,
            turns=(layout.parse_turns(stream),),
            log_tokens=len(stream),
            seconds=time.monotonic() - began,
            clip_seconds=self._clip_seconds(task.task, len(task.script)),
        )
        return summary, GroupPayload((stream,), "frames", clip.frames)

    # --- engine thread ------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._inbox or self._swaps or self.engine.busy):
                    self._wake.wait(timeout=IDLE_WAKE_S)
                if self._stopping:
                    return
                arrived, swaps = list(self._inbox), list(self._swaps)
                self._inbox.clear()
                self._swaps.clear()
            began = time.monotonic()
            for staged, fetch_s, future in swaps:
                self._swap(staged, fetch_s, future)
            for group in arrived:
                self._start(group)
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout (all that run share a step)
                self.engine.drop_all()
                for group in list(self._groups.values()):
                    self._fail(group, error)
                self._groups.clear()
            self._drop_late()
            self._busy_s += time.monotonic() - began

    def _swap(self, staged: StagedWeights, fetch_s: float, future: Future[SwapReport]) -> None:
        began = time.monotonic()
        if staged.version > self.engine.version:
            try:
                with self.meter.phase("swap"):
                    staged.apply(self.backbone)
            except RuntimeError as error:  # a copy that the device refuses: the driver hears of it and stops
                self._promises.settle(future, error=error)
                return
            self.engine.version = staged.version
            if staged.outdates(self.setup.boundary):
                self._features.clear()
        now = time.monotonic()
        busy, self._busy_at_swap = self._busy_s - self._busy_at_swap, self._busy_s
        since, self._swapped_at = now - self._swapped_at, now
        report = SwapReport(self.worker, self.engine.version, fetch_s, now - began, busy / since if since else 0.0)
        self._promises.settle(future, report)

    def _start(self, group: _Group) -> None:
        task = group.task
        assert group.clip is not None
        assert group.layout is not None
        try:
            self._encode(group)
            memory = task.memory or self.setup.memory
            turns = turn_inputs(
                task.task,
                group.clip,
                group.layout,
                self.setup.video.chunk_seconds_of(task.task),
                self.backbone.image.merge_size,
                self.engine.version if self.setup.boundary.vision_trains else None,
            )
            for stream_id in group.stream_ids():
                self.engine.add(
                    StreamRequest(
                        header=self._header(stream_id, task.task.id, memory, group.layout, task.temperature),
                        turns=turns,
                        features=tuple(group.features),  # type: ignore[arg-type]
                        policy=make_policy(memory),
                        layout=group.layout,
                        patch_seconds=self._cursor(task.task).patch_seconds,
                    )
                )
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            self.engine.cancel(set(group.stream_ids()))
            self._fail(group, error)
            return
        # From here, not from the submission: decoding has a deadline of its own, and waiting is nobody's fault.
        group.deadline = time.monotonic() + self.limits.deadline_s
        self._groups[task.group] = group

    @torch.no_grad()
    def _encode(self, group: _Group) -> None:
        """The group's clip at the freeze boundary, as given, as kept, or encoded now; and as its streams embed it.

        The mergers of `freeze=tower` run here for every group: what they make lives as long as it.
        """
        boundary = self.setup.boundary
        if group.encoded is None:
            assert group.clip is not None
            key = clip_key(group.task.task, group.task.turns)
            kept = self._features.get(key)
            if kept is None:
                encode = self.backbone.encode_pre_merger if boundary.worker_merges else self.backbone.encode_video
                with self.meter.phase("encode"):
                    encoded = encode([group.clip.frames])[0]
                self._clips_encoded += 1
                kept = (encoded, None if boundary.learner_runs_tower else self._put(to_array(encoded)))
                self._features.put(key, kept, encoded.nbytes)
            group.encoded, group.encoded_ref = kept
        group.features = self.backbone.merge([group.encoded])[0] if boundary.worker_merges else group.encoded

    def _step(self) -> None:
        if not self.engine.busy:
            return
        # One of thousands: outside CUDA, where reading the peak is not free, only its time is taken.
        with self.meter.phase("engine step", peak=self.meter.cuda):
            finished = self.engine.step()
        for stream in finished:
            name = stream.header.stream_id.rsplit("/", 1)[0]
            group = self._groups[name]
            group.logs[stream.header.stream_id] = stream
            self._monitor(group, stream)
            if len(group.logs) == group.task.streams:
                result = self._result(group)
                del self._groups[name]
                self._promises.settle(group.future, result)

    def _monitor(self, group: _Group, stream: StreamLog) -> None:
        """Re-score every N-th stream that lived under one version, on the weights that made it."""
        self._finished_streams += 1
        every = self.setup.monitor_every
        if not every or self._finished_streams % every or stream.single_version != self.engine.version:
            return
        assert group.features is not None
        features = group.features.flatten(0, 1)
        with self.meter.phase("self-check"):
            differences = behaviour_differences(
                self.backbone, [stream], [features], head_chunk=SELF_CHECK_HEAD, attention=self._scoring.name
            )[0]
        group.monitor.append(LogpDiff.of(differences))
        sampled = np.flatnonzero(stream.sampled)
        group.off.append(OffToken.of(stream, sampled, differences, self.setup.off_above))

    def _drop_late(self) -> None:
        now = time.monotonic()
        for name, group in list(self._groups.items()):
            if now > group.deadline:
                self.engine.cancel(set(group.stream_ids()))
                del self._groups[name]
                limit = f"rollout.group_deadline_s={self.limits.deadline_s:g}"
                self._fail(group, TimeoutError(f"the group was not finished within {limit}"))

    def _result(self, group: _Group) -> GroupResult:
        assert group.layout is not None
        assert group.clip is not None
        logs = tuple(group.logs[stream_id] for stream_id in group.stream_ids())
        summary = GroupSummary(
            group=group.task.group,
            task_id=group.task.task.id,
            worker=self.worker,
            turns=tuple(group.layout.parse_turns(stream) for stream in logs),
            targets=tuple(stream.targets_by_turn for stream in logs),
            oldest_version=min(stream.oldest_version for stream in logs),
            versions=tuple(sorted({version for stream in logs for version in stream.versions})),
            tokens=sum(int(stream.sampled.sum()) for stream in logs),
            log_tokens=sum(len(stream) for stream in logs),
            evicted_tokens=sum(stream.evicted_tokens for stream in logs),
            seconds=time.monotonic() - group.began,
            clip_seconds=self._clip_seconds(group.task.task, group.task.turns),
            monitor=LogpDiff.merge(group.monitor),
            off=most_telling(group.off),
            features=group.encoded_ref,
            feature_bytes=0 if group.encoded is None else group.encoded.nbytes,
        )
        if group.encoded_ref is not None:
            return summary, GroupPayload(logs, self.setup.boundary.ships, group.encoded_ref)
        return summary, GroupPayload(logs, "frames", group.clip.frames)

    def _fail(self, group: _Group, error: Exception) -> None:
        task = group.task
        clip_seconds = self._clip_seconds(task.task, task.turns)
        summary = self._failure(task.group, task.task.id, clip_seconds, group.began, error)
        self._promises.settle(group.future, (summary, None))

    def _failure(self, group: str, task: str, clip_seconds: float, began: float, error: Exception) -> GroupSummary:
        cause = f"{type(error).__name__}: {error}"
        log.warning("worker %d, weights v%d: group %s failed: %s", self.worker, self.engine.version, group, cause)
        return GroupSummary(
            group=group,
            task_id=task,
            worker=self.worker,
            seconds=time.monotonic() - began,
            clip_seconds=clip_seconds,
            failed=cause,
        )

    def _header(
        self, stream_id: str, task_id: str, memory: MemoryConfig, layout: Layout, temperature: float
    ) -> LogHeader:
        return LogHeader(
            stream_id=stream_id,
            task_id=task_id,
            backbone=self.backbone.name,
            policy=memory.name,
            policy_knobs=knobs(memory),
            position_convention=self.backbone.position_convention,
            banned=layout.banned,
            seed=stream_seed(self.setup.run_seed, stream_id),
            temperature=temperature,
            score_temperature=temperature or 1.0,
        )

    def _clip_seconds(self, task: StreamTask, turns: int) -> float:
        """Length of the task's segment; of what was asked for where the row does not say."""
        if math.isfinite(task.end):
            return task.end - task.start
        return turns * self.setup.video.chunk_seconds

    def _cursor(self, task: StreamTask) -> Any:
        video = self.setup.video
        patches = video.frames_per_chunk // self.backbone.image.temporal_patch_size
        return self.backbone.cursor(video.chunk_seconds_of(task) / patches)
