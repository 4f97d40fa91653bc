"""Video clips as pixels, asked of the decode process under a deadline: causal frame grid, resizing to a pixel budget.

Decoding happens in a child process (`streams.video.decode`) under a deadline, so that no file can stop a job.

Invariants:
* a chunk's frames depend only on the video and the chunk's place in the stream, never on what follows;
* a file that cannot be read costs a VideoError and, at most, the child process;
* a closed reader leaves no process behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from streams.support.files import PROJECT
from streams.video.config import TEMPORAL_PATCH, VideoConfig
from streams.video.decode import READY, ClipRequest, DurationRequest, frame_times, smart_resize
from streams.video.patches import normalize_patches, patchify
from streams.video.presentation import Presentation

if TYPE_CHECKING:
    from types import TracebackType

    from streams.task import Plan, StreamTask, VideoFile

__all__ = [
    "Clip",
    "ClipReader",
    "ReaderClosedError",
    "VideoConfig",
    "VideoError",
    "frame_times",
    "normalize_patches",
    "patchify",
    "smart_resize",
]

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
REPLY_GRACE_S = 2.0


class VideoError(ValueError):
    """A video that cannot be used; it costs its sample, not the job."""

    def __init__(self, video: str, reason: str) -> None:
        super().__init__(video, reason)
        self.video = video
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.video}: {self.reason}"


class ReaderClosedError(RuntimeError):
    """The reader was closed before the clip was read: the end of a stage or of the run, no fault of the video."""


@dataclass(frozen=True)
class Clip:
    """The frames of a clip, chunk by chunk.

    Attributes:
        frames: uint8 [num_chunks, frames_per_chunk, H, W, 3]: the last picture up to each time, black before the first.
        frame_times: float64 [num_chunks, frames_per_chunk]: the times asked for, in seconds on the video's clock.
        patch_size: side of a vision patch in pixels.
    """

    frames: np.ndarray
    frame_times: np.ndarray
    patch_size: int = 14

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches of one chunk (before merging): time, rows, columns."""
        _, count, height, width, _ = self.frames.shape
        return count // TEMPORAL_PATCH, height // self.patch_size, width // self.patch_size

    @property
    def nbytes(self) -> int:
        return int(self.frames.nbytes + self.frame_times.nbytes)


def _closed_before(video: str) -> ReaderClosedError:
    return ReaderClosedError(f"the clip reader was closed before {video} was read")


class _Child:
    """One decode process and the pipe to it. Its error output is kept for the message if it dies.

    Only the thread that holds the reader's turn uses the pipe and closes it; any other thread may `interrupt`.
    """

    def __init__(self) -> None:
        self.connection, theirs = Pipe(duplex=True)
        self._end = ""
        root = str(PROJECT)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        try:
            # -P: the working directory is not searched for modules, it may be anybody's.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "streams.video.decode", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._noise,
            )
        except BaseException:
            self.connection.close()
            self._noise.close()
            raise
        finally:
            theirs.close()

    def wait_ready(self) -> bool:
        """Wait until the process answers; False if it ended, or was interrupted, before it did."""
        try:
            return self.connection.poll(START_TIMEOUT_S) and self.connection.recv() == READY
        except (EOFError, OSError):
            return False

    def ask(self, request: ClipRequest | DurationRequest, give_up: float) -> Any:
        """The reply, or None when it did not come before `give_up` (the child must then be stopped)."""
        # A child that hangs half-way through its reply would block `recv`: killed, it ends in EOFError.
        patience = max(0.0, give_up - time.monotonic())
        watchdog = threading.Timer(patience + REPLY_GRACE_S, self.process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self.connection.send((request.kind, asdict(request)))
            if self.connection.poll(max(0.0, give_up - time.monotonic())):
                return self.connection.recv()
        finally:
            watchdog.cancel()
        return None

    def interrupt(self) -> None:
        """End whatever is under way on the pipe with an end of file, from any thread; the process is killed.

        The pipe is shut down, not closed: a closed descriptor's number may be another file's at once, which the thread
        that still waits on it would then read. It also wakes that thread if the process cannot be killed (stuck in a
        disk's driver).
        """
        self.process.kill()
        with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    def stop(self, patience_s: float = 0.0) -> str:
        """End the process, after `patience_s` if it does not end by itself; say how it ended. May be called twice."""
        if self._end:
            return self._end
        self._end = "it was being ended"
        self.connection.close()
        try:
            code = self.process.wait(patience_s) if patience_s else self.process.poll()
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:  # an interrupt: no time to wait, but nothing may be left running
            self.process.kill()
            raise
        if code is None:
            self.process.kill()
            try:
                code = self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._noise.close()
                self._end = f"it could not be killed within {STOP_TIMEOUT_S:g} s (process {self.process.pid})"
                return self._end
        self._noise.seek(0)
        said = self._noise.read()[-400:].decode(errors="replace").strip()
        self._noise.close()
        self._end = f"exit code {code}" + (f", last words: {said}" if said and code else "")
        return self._end


class ClipReader:
    """Reads clips, one at a time; `close` may be called from another thread while one is being read.

    The decode process is started by the first read, and by the next read after it was lost. It has one owner: the thread
    whose turn it is (`_turn`). `close` interrupts that thread, waits for its turn, and leaves no process behind.
    """

    def __init__(self, config: VideoConfig, patch_size: int = 14, merge_size: int = 2) -> None:
        self.config = config
        self.patch_size = patch_size
        self.factor = patch_size * merge_size
        self._child: _Child | None = None
        self._closed = False
        # Re-entrant: a signal handler may close the reader in the middle of its own thread's read.
        self._turn = threading.RLock()
        # Guards `_child` and `_closed`; held for moments only, never while anything is waited for.
        self._state = threading.RLock()

    def read(
        self,
        video: str,
        start: float,
        end: float,
        num_chunks: int,
        *,
        chunk_seconds: float | None = None,
        min_chunks: int = 1,
        file: VideoFile | None = None,
    ) -> Clip:
        """Read the first `num_chunks` chunks of the segment [start, end); a partial one repeats its last frame.

        Args:
            end: `math.inf` means as far as the video goes; there may then be fewer chunks, but at least `min_chunks`.
            chunk_seconds: None: the configured length.
            file: what the file must still be; None: any file is read.

        Raises VideoError for a video that cannot be used, ReaderClosedError once the reader is closed.
        """
        if not 0 <= start < end:
            raise ValueError(f"{video}: start={start} and end={end} must satisfy 0 <= start < end")
        seconds = self.config.chunk_seconds if chunk_seconds is None else chunk_seconds
        if num_chunks < 1 or start + (num_chunks - 1) * seconds >= end - 1e-6 * seconds:
            raise ValueError(
                f"{video}: num_chunks={num_chunks} of {seconds:g} s must be at least 1 and "
                f"the last one must start inside [{start}, {end})"
            )
        request = ClipRequest(
            video=video,
            start=start,
            end=end,
            num_chunks=num_chunks,
            min_chunks=min(min_chunks, num_chunks),
            chunk_seconds=seconds,
            frames_per_chunk=self.config.frames_per_chunk,
            min_pixels=self.config.min_pixels,
            max_pixels=self.config.max_pixels,
            factor=self.factor,
            deadline_s=self.config.decode_timeout_s,
            root=file.root if file else "",
            size=file.size if file else None,
        )
        kind, payload = self._ask(request)
        if kind != "frames":
            raise VideoError(video, str(payload))
        times = frame_times(start, len(payload), seconds, self.config.frames_per_chunk)
        return Clip(frames=payload, frame_times=times, patch_size=self.patch_size)

    def read_task(self, task: StreamTask, plan: Plan) -> Clip:
        """Read the chunks that the plan shows of a task; its last answer's must be among them, the tail need not."""
        seconds = plan.chunk_seconds
        needed = min(plan.turns, task.due_turns(seconds))
        return self.read(
            task.video,
            task.start,
            task.end,
            plan.turns,
            chunk_seconds=seconds,
            min_chunks=needed,
            file=task.file,
        )

    def presentation(self, video: str) -> Presentation:
        """Return what a player shows of the file, and when. Raises VideoError."""
        _, payload = self._ask(DurationRequest(video, self.config.decode_timeout_s))
        if not isinstance(payload, Presentation):
            raise VideoError(video, str(payload))
        return payload

    def duration(self, video: str) -> float:
        """Return the end of the last picture that the file shows, in seconds on its clock. Raises VideoError."""
        return self.presentation(video).end

    def _ask(self, request: ClipRequest | DurationRequest) -> tuple[str, Any]:
        with self._turn:
            child = self._ready_child(request.video)
            limit = self.config.decode_timeout_s
            give_up = time.monotonic() + limit
            reply: tuple[str, Any] | None = None
            lost = False
            try:
                reply = child.ask(request, give_up)
            except (EOFError, OSError):
                lost = time.monotonic() < give_up
            finally:
                # Also when an interrupt passes through: the late reply must not answer the next request.
                how = ""
                if reply is None:
                    # A process that just died needs a moment until its exit code can be read.
                    how = self._give_up(child, patience_s=1.0 if lost else 0.0)
            if reply is not None:
                return reply
            if self._closed:
                raise _closed_before(request.video)
        if lost:
            raise VideoError(
                request.video,
                f"the decode process died while reading it ({how}); the next read starts another",
            )
        raise VideoError(
            request.video,
            f"decoding did not finish within data.video.decode_timeout_s={limit:g} s; the decode process was ended",
        )

    def _ready_child(self, video: str) -> _Child:
        """The decode process, started if there is none. Raises ReaderClosedError, RuntimeError if it does not start."""
        with self._state:
            if self._closed:
                raise _closed_before(video)
            child = self._child
        if child is not None:
            if child.process.poll() is None:
                return child
            # It died while it was idle: not this video's fault.
            self._give_up(child)
        with self._state:
            if self._closed:
                raise _closed_before(video)
            # Known before it is waited for, so that `close` can end the wait.
            child = self._child = _Child()
        ready, how = False, ""
        try:
            ready = child.wait_ready()
        finally:
            if not ready:
                how = self._give_up(child)
        if ready:
            return child
        if self._closed:
            raise _closed_before(video)
        raise RuntimeError(f"the video decode process did not start (waited {START_TIMEOUT_S:g} s at most): {how}")

    def _give_up(self, child: _Child, patience_s: float = 0.0) -> str:
        """Stop the process; say how it ended. Only for the thread whose turn it is."""
        with self._state:
            self._child = None
        return child.stop(patience_s)

    @property
    def child_pid(self) -> int | None:
        """Process id of the decode process, None while there is none."""
        child = self._child
        return None if child is None else child.process.pid

    def close(self) -> None:
        """End the decode process, for good: a read under way, and every later one, raises ReaderClosedError.

        May be called from any thread and more than once. Raises TimeoutError if the thread that reads does not let go.
        """
        with self._state:
            self._closed = True
        # An idle process ends by itself when its pipe closes; one at work would first finish its clip.
        if not self._turn.acquire(blocking=False):
            with self._state:
                if self._child is not None:
                    self._child.interrupt()
            if not self._turn.acquire(timeout=2 * STOP_TIMEOUT_S):
                raise TimeoutError(f"waited {2 * STOP_TIMEOUT_S:g} s for a read to end after its reader was closed")
        try:
            if self._child is not None:
                self._give_up(self._child, patience_s=STOP_TIMEOUT_S)
        finally:
            self._turn.release()

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
