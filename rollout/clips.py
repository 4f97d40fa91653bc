"""The clips of one worker: read once, encoded once at the freeze boundary, both kept under a byte budget.

Threads: the prepare thread calls `ClipFrames.read` and `ClipFeatures.fetch`; one thread, the encode thread or else the engine
thread, `claim` and `advance`; the engine thread `embed` and `replace_weights`. `leave` and `stop` may be called from any.
`ClipFrames` owns the decode process, through its reader; `ClipFrames.close` ends it, from any thread.

Invariants:
* streams that show a clip embed the same tensor: exactly the one shipped to the learner or, with freeze=tower, the current
  mergers' output for it;
* a clip is encoded by one version of the weights at the boundary. While they are replaced no call of the tower runs
  (`WeightsTurn`); what is half encoded by then begins anew, and what is encoded and waits is encoded anew (`outdated`);
* clips that wait for the engine and clips that are kept take no more than the budget, or are one clip (`EncodedClips`). What
  running streams embed is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout.threads import EncodedClips, Place, WeightsTurn
from streams.backbone.backbone import Backbone, to_array, to_tensor
from streams.backbone.boundary import Boundary
from streams.backbone.tower import ClipEncoding
from streams.messages import RolloutTask
from streams.support.byte_cache import ByteBudgetCache
from streams.support.meter import Meter
from streams.task import Plan, StreamTask
from streams.video.reader import Clip, ClipReader
from streams.writing.inputs import clip_key


@dataclass(frozen=True)
class Encoded:
    """A clip at the freeze boundary, [chunks, tokens, P or F] (see GroupPayload).

    reference: what ships it to the learner; None where the learner encodes frames itself.
    ready: after it the tensor is whole, on CUDA, where another stream than the engine's makes it.
    """

    tensor: torch.Tensor
    reference: Any
    ready: torch.cuda.Event | None = None


@dataclass
class Encoding:
    """A group's clip on its way through the tower, slice by slice, and its place under the budget.

    Attributes:
        frames, clip: what is encoded, and how far that is; None where the place had its value already.
        generation: of the weights (`EncodedClips.generation`) that made the slices so far.
        restarts: times that other weights came meanwhile.
    """

    place: Place[Encoded]
    frames: np.ndarray | None = None
    clip: ClipEncoding | None = None
    generation: int = 0
    restarts: int = 0

    @property
    def made(self) -> Encoded | None:
        """The clip, once all of it is encoded."""
        return self.place.value

    @property
    def outdated(self) -> bool:
        """Whether the weights that made it have been replaced since."""
        return self.place.outdated


class ClipFrames:
    """Reads clips and keeps the last ones."""

    def __init__(self, reader: ClipReader, budget_bytes: int) -> None:
        self._reader = reader
        self._kept: ByteBudgetCache[Clip] = ByteBudgetCache(budget_bytes)

    def read(self, task: StreamTask, plan: Plan) -> Clip:
        """Return the chunks of the task that the plan shows. Raises VideoError, and ReaderClosedError after `close`."""
        key = clip_key(task, plan.turns)
        clip = self._kept.get(key)
        if clip is None:
            clip = self._reader.read_task(task, plan)
            self._kept.put(key, clip, clip.nbytes)
        return clip

    def close(self) -> None:
        """End the decode process, and a read under way with ReaderClosedError."""
        self._reader.close()


class ClipFeatures:
    """Encodes clips at the boundary and keeps the last ones. `clips_encoded` counts those that were not kept."""

    def __init__(
        self,
        backbone: Backbone,
        boundary: Boundary,
        budget_bytes: int,
        put: Callable[[np.ndarray], Any],
        get: Callable[[Any], np.ndarray],
        meter: Meter,
        *,
        ahead: bool,
        limit_s: float,
    ) -> None:
        """put: stores an array and returns a reference to ship; get: resolves one.

        ahead: another thread than the engine's encodes. limit_s: how long that and a swap of weights wait for each other.
        """
        self._backbone, self._boundary, self._put, self._get, self._meter = backbone, boundary, put, get, meter
        self._clips: EncodedClips[Encoded] = EncodedClips(budget_bytes)
        self._weights = WeightsTurn(limit_s)
        self.ahead = ahead
        self._stream: torch.cuda.Stream | None = None
        if ahead and backbone.device.type == "cuda":
            self._stream = torch.cuda.Stream()
            # The weights were loaded on the stream of this thread.
            self._stream.wait_stream(torch.cuda.current_stream())
        self.clips_encoded = 0

    # --- prepare thread ---------------------------------------------------------------------------------------

    def fetch(self, reference: Any) -> torch.Tensor:
        """Return a clip that another worker has encoded, in host memory."""
        return to_tensor(self._get(reference))

    # --- the thread that encodes ------------------------------------------------------------------------------

    def claim(self, task: RolloutTask, clip: Clip, given: torch.Tensor | None) -> Encoding | None:
        """Return a group's clip with a place under the budget: as given with its task, as kept, or to be encoded.

        Where what waits for the engine leaves no room: on the encode thread wait for it, on the engine thread return None.
        Raises StoppedError.
        """
        if given is not None:
            place = self._clips.take(None, given.nbytes, wait=self.ahead)
            return None if place is None else self._copy(place, given, task.features)
        encoding = self._begin(clip.frames)
        place = self._clips.take(clip_key(task.task, task.plan.turns), encoding.nbytes, wait=self.ahead)
        if place is None or place.value is not None:
            return None if place is None else Encoding(place)
        return Encoding(place, clip.frames, encoding, self._clips.generation)

    def advance(self, encoding: Encoding) -> int:
        """Encode the next slice; with the last one the clip is `made`. Returns the patches that the tower was given.

        Raises StoppedError, and TimeoutError if new weights do not let go of the tower's.
        """
        self._clips.check()
        assert encoding.frames is not None
        assert encoding.clip is not None
        with self._phase(), self._weights.read(), self._on_stream():
            if encoding.generation != self._clips.generation:
                encoding.clip, encoding.generation = self._begin(encoding.frames), self._clips.generation
                encoding.restarts += 1
            patches = encoding.clip.advance()
            if self._stream is not None:
                # Inside the turn: the weights may be replaced as soon as it ends, and kernels must have read them.
                self._stream.synchronize()
        if encoding.clip.done:
            self._fill(encoding, encoding.clip.finish())
        return patches

    def _fill(self, encoding: Encoding, made: torch.Tensor) -> None:
        """Put a clip into its place, unless other weights came since its last slice: then it is still not made."""
        with self._on_stream():
            # A training tower's output is of no use to the learner: it ships nothing, and frames go instead.
            reference = None if self._boundary.learner_runs_tower else self._put(to_array(made))
            encoded = Encoded(made, reference, self._event())
        if self._clips.fill(encoding.place, encoded, encoding.generation):
            encoding.frames = encoding.clip = None
            self.clips_encoded += 1

    def _copy(self, place: Place[Encoded], given: torch.Tensor, reference: Any) -> Encoding:
        with self._on_stream():
            encoded = Encoded(given.to(self._backbone.device), reference, self._event())
        while not self._clips.fill(place, encoded, self._clips.generation):
            pass  # weights came between both arguments; what is given does not depend on them
        return Encoding(place)

    def _begin(self, frames: np.ndarray) -> ClipEncoding:
        return self._backbone.encoding(frames, pre_merger=self._boundary.worker_merges)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def _phase(self) -> AbstractContextManager[None]:
        return self._meter.beside("encode") if self.ahead else self._meter.phase("encode")

    # --- engine thread ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, encoded: Encoded) -> torch.Tensor:
        """Return what streams embed, [chunks, tokens, F].

        With freeze=tower the mergers run for every group, and what they make lives as long as the group: they train.
        """
        if encoded.ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(encoded.ready)
            # The allocator hands freed memory to the stream that it was made on, which may be ahead of this one.
            encoded.tensor.record_stream(current)
        return self._backbone.merge([encoded.tensor])[0] if self._boundary.worker_merges else encoded.tensor

    def replace_weights(self, copy: Callable[[], None]) -> None:
        """Let `copy` replace weights that encode, between two calls of the tower, and forget what the old ones have made.

        Raises TimeoutError if a call of the tower does not end.
        """
        with self._weights.replace():
            # First: a copy that fails half-way must not leave anything to be used with what it has left.
            self._clips.outdate()
            copy()

    # --- any thread -------------------------------------------------------------------------------------------

    def leave(self, encoding: Encoding) -> None:
        """End a group's wait for the engine, or for its clip."""
        self._clips.leave(encoding.place)

    def stop(self) -> None:
        """End what is being encoded, or waits for room, with StoppedError."""
        self._clips.stop()
