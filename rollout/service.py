"""The rollout worker without Ray: its threads, what is handed from one to the other, and the swap of weights.

    any thread      submit, script, stage, stats, close       they hand work over, or wait
    prepare thread  reads clips, writes demonstrations        a slow file delays no running stream
    encode thread   encodes clips, where their weights are    only on CUDA; elsewhere the engine thread encodes, a slice
                    frozen                                    between two steps (`streams.backbone.slices`)
    engine thread   steps, swaps, re-scores                   the only one that runs the text model and the mergers

    submit -> prepare thread: Groups.read -> encode thread: Groups.encode -> inbox -> engine thread: Groups.start,
              Groups.step -> the group's future
    script -> prepare thread: Demonstrations.write -> the demonstration's future
    stage  -> inbox -> engine thread: StagedWeights.apply -> the swap's future

The encode thread is not the prepare thread, so that the next clip is decoded, by its own process, while one is encoded.

Every lock is in `rollout.threads`, `rollout.promises`, the meter or the clip reader. The decode process belongs to that reader
(`rollout.clips.ClipFrames`): the prepare thread alone reads through it, and `close` ends it.

Invariants:
* only the engine thread touches engine, weights and running groups; a thread that encodes reads weights that are frozen,
  and not while they are replaced all the same (`rollout.clips`);
* new weights are copied in between two steps;
* one task's failure is that task's result, with its cause, and never the worker's end;
* every future handed out is settled: what `close` leaves undone ends in ServiceClosedError, which is no task's failure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from rollout.clips import ClipFeatures, ClipFrames
from rollout.demonstrations import Demonstrations
from rollout.engine.engine import Engine
from rollout.groups import Group, GroupResult, Groups
from rollout.promises import Promises
from rollout.recipe import StreamRecipe
from rollout.self_check import SelfCheck
from rollout.setup import WorkerSetup
from rollout.staging import StagedWeights
from rollout.threads import BusyShare, Inbox, StoppedError, Swap, WorkThread
from streams.backbone.backbone import Backbone
from streams.backbone.fused.modules import settle_fused_kernels
from streams.backbone.kernel_choice import choose_learner_attention, choose_vision_attention
from streams.backbone.slices import encodes_ahead
from streams.memory import CONTIGUOUS, make_policy
from streams.messages import RolloutTask, ScriptTask, SwapReport, WeightsUpdate, WorkerStats
from streams.support.meter import Meter
from streams.video.reader import ClipReader, ReaderClosedError
from streams.writing.writer import check_timestamps_kept

log = logging.getLogger("sightline.rollout")

PREPARE_JOIN_S = 10.0
ENCODE_JOIN_S = 10.0
ENGINE_JOIN_S = 30.0
"""How long `close` waits for each thread: to drop a clip, for a call of the tower to end, for an engine step to end."""


class RolloutService:
    """One worker: see the module docstring."""

    def __init__(
        self,
        worker: int,
        setup: WorkerSetup,
        cache_mb: int,
        put: Callable[[np.ndarray], Any],
        get: Callable[[Any], np.ndarray],
    ) -> None:
        """Load the checkpoint and start the threads. Raises ValueError for what this machine refuses.

        Args:
            cache_mb: MiB of frames and of features that are kept, each.
            put: stores an array and returns a reference to ship.
            get: resolves such a reference.
        """
        self.worker = worker
        self.setup = setup
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vision = choose_vision_attention(setup.vision_attention, device, setup.dtype)
        fused = settle_fused_kernels(setup.fused_kernels, device, setup.dtype)
        self.meter = Meter()
        with self.meter.phase("load"):
            self.backbone = Backbone.load(
                setup.checkpoint,
                setup.layout,
                dtype=getattr(torch, setup.dtype),
                device=device,
                vision_attention=vision.name,
                fused_kernels=fused.name,
            )
        rollout = setup.rollout
        self.engine = Engine(
            self.backbone,
            setup.kv_slots,
            rollout.max_streams,
            rollout.attention,
            rollout.decode_steps,
            rollout.cuda_graphs,
        )
        # The learner may be asked for a kernel that its device has and this one lacks.
        scoring = choose_learner_attention(setup.self_check.attention if device == "cuda" else "auto", device)
        engine = self.engine
        kernels = (engine.attention, engine.decode_attention, engine.graphs, fused, vision, scoring)
        log.info(
            "worker %d: attention %s, decode %s, decode steps %s, fused kernels %s, vision attention %s, self-check %s",
            worker,
            *kernels,
        )
        self.engine.version = setup.version
        self._check_memory()
        image, budget = self.backbone.image, cache_mb * 2**20
        recipe = StreamRecipe(setup, self.backbone)
        self._frames = ClipFrames(ClipReader(setup.video, image.patch_size, image.merge_size), budget)
        self._features = ClipFeatures(
            self.backbone,
            setup.boundary,
            budget,
            put,
            get,
            self.meter,
            ahead=encodes_ahead(setup.boundary, device),
            limit_s=rollout.group_deadline_s,
        )
        check = SelfCheck(self.backbone, setup.self_check, scoring.name, self.meter)
        self._groups = Groups(worker, recipe, self.engine, self._frames, self._features, check, self.meter)
        self._demonstrations = Demonstrations(worker, recipe, self._frames)
        self._promises = Promises(f"rollout worker {worker}")
        self._inbox = Inbox()
        self._busy = BusyShare()
        self._prepare = WorkThread("prepare")
        self._encode = WorkThread("encode") if self._features.ahead else None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def _check_memory(self) -> None:
        """Refuse a memory that this machine or this checkpoint cannot have, before any group."""
        try:
            policy = make_policy(self.setup.memory)
        except ValueError as error:  # the driver has made the same: what differs is what Python finds here
            raise ValueError(
                f"{error} (in rollout worker {self.worker}: a policy's module must be importable there, too)"
            ) from error
        check_timestamps_kept(self.backbone.layout, policy)
        if policy.positions == CONTIGUOUS:
            self.engine.hold_unrotated_keys()

    # --- called from any thread -------------------------------------------------------------------------------

    def submit(self, task: RolloutTask) -> Future[GroupResult]:
        """Run one group; the future holds its summary and payload, or a summary that says why it failed.

        Raises ServiceClosedError; so does the future of a group that `close` cut off.
        """
        future = self._promises.make(f"group {task.group}")
        self._prepare.submit(self._read_group, Group(task, future, time.monotonic()))
        return future

    def script(self, task: ScriptTask) -> Future[GroupResult]:
        """Lay out one demonstration as a log with its frames. Raises ServiceClosedError, as `submit` does."""
        future = self._promises.make(f"the demonstration of {task.group}")
        self._prepare.submit(self._write_demonstration, task, future)
        return future

    def stage(self, update: WeightsUpdate, fetch_s: float) -> Future[SwapReport]:
        """Unpack a fetched version and have it swapped in between two steps. Raises ServiceClosedError, as `submit` does."""
        staged = StagedWeights.stage(update, self.backbone, self.setup.staging)
        future = self._promises.make(f"the swap to version {update.version}")
        self._inbox.put_swap(Swap(staged, fetch_s, future))
        return future

    def stats(self) -> WorkerStats:
        return WorkerStats(self.worker, self._features.clips_encoded, self._busy.lasts())

    def close(self) -> None:
        """End the threads and the decode process; whatever is not finished ends in ServiceClosedError.

        Ends a read under way, waits for a step and a call of the tower under way. May be called from any thread and more than
        once.
        """
        self._inbox.stop()
        self._prepare.refuse()
        self._promises.refuse()
        self._features.stop()
        # Before the threads are waited for: a read is what the prepare thread may be stuck in for longest.
        self._frames.close()
        if not self._prepare.end(PREPARE_JOIN_S):
            log.warning("worker %d: the prepare thread still works %g s after close", self.worker, PREPARE_JOIN_S)
        if self._encode is not None and not self._encode.end(ENCODE_JOIN_S):
            log.warning("worker %d: the encode thread still works %g s after close", self.worker, ENCODE_JOIN_S)
        self._thread.join(timeout=ENGINE_JOIN_S)
        if self._thread.is_alive():
            log.warning("worker %d: an engine step still runs %g s after close", self.worker, ENGINE_JOIN_S)
        # Last: what the threads still finished was answered by them.
        self._promises.cut_off()

    def _answer(self, future: Future[GroupResult], result: GroupResult) -> None:
        summary, _ = result
        if summary.failed is not None:
            version = self.engine.version
            log.warning(
                "worker %d, weights v%d: group %s failed: %s", self.worker, version, summary.group, summary.failed
            )
        self._promises.settle(future, result)

    # --- prepare thread ---------------------------------------------------------------------------------------

    def _read_group(self, group: Group) -> None:
        try:
            failed = self._groups.read(group)
        except ReaderClosedError:
            return  # `close` settles the group
        if failed is not None:
            self._answer(group.future, failed)
        elif self._encode is None:
            self._inbox.put_group(group)
        else:
            self._encode.submit(self._encode_group, group)

    def _write_demonstration(self, task: ScriptTask, future: Future[GroupResult]) -> None:
        try:
            result = self._demonstrations.write(task)
        except ReaderClosedError:
            return  # `close` settles the demonstration
        self._answer(future, result)

    # --- encode thread ----------------------------------------------------------------------------------------

    def _encode_group(self, group: Group) -> None:
        try:
            failed = self._groups.encode(group)
        except StoppedError:
            return  # `close` settles the group
        if failed is None:
            self._inbox.put_group(group)
        else:
            self._answer(group.future, failed)

    # --- engine thread ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        # A call a round: staged weights and clips must not live on in a local while the thread sleeps.
        while self._round():
            pass

    def _round(self) -> bool:
        """Wait for work, take in what is new and run one step; False once the service closes."""
        waiting = self._inbox.wait(lambda: self.engine.busy or bool(self._groups.unencoded))
        if waiting is None:
            return False
        groups, swaps = waiting
        self._busy.begin()
        for swap in swaps:
            self._swap(swap)
        for group in groups:
            if self._encode is None:
                self._groups.unencoded.append(group)
            elif self._groups.outdated(group):
                self._encode.submit(self._encode_group, group)
            elif (failed := self._groups.start(group)) is not None:
                self._answer(group.future, failed)
        try:
            for group, result in self._groups.encode_some():
                self._answer(group.future, result)
        except StoppedError:
            return False  # `close` settles what is left
        self._step()
        self._busy.end()
        return True

    def _step(self) -> None:
        try:
            for group, result in self._groups.step():
                self._answer(group.future, result)
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout (all that run share a step)
            for group, result in self._groups.fail_running(error):
                self._answer(group.future, result)
        for group, result in self._groups.drop_late():
            self._answer(group.future, result)

    def _swap(self, swap: Swap) -> None:
        began = time.monotonic()
        # An older one may arrive behind a newer: it is answered, with the version that runs, and not applied.
        if swap.staged.version > self.engine.version:
            try:
                with self.meter.phase("swap"):
                    if swap.staged.outdates(self.setup.boundary):
                        self._features.replace_weights(lambda: swap.staged.apply(self.backbone))
                    else:
                        swap.staged.apply(self.backbone)
            # A copy that the device refuses, a tower that does not end: the driver hears of it and stops.
            except (RuntimeError, TimeoutError) as error:
                self._promises.settle(swap.future, error=error)
                return
            self.engine.version = swap.staged.version
        now = time.monotonic()
        report = SwapReport(self.worker, self.engine.version, swap.fetch_s, now - began, self._busy.take(now))
        self._promises.settle(swap.future, report)
