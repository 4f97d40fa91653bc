"""From a task and its clip to the turns that a stream is shown.

Invariant: only this module decides in which turn a query arrives; rollout and SFT both use it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from streams.layout.layout import Layout
from streams.log.record import NEVER, ChunkRecord
from streams.task import TimedQuery
from streams.video.config import Spanned
from streams.video.reader import Clip, frame_times
from streams.writing.writer import QueryInput, TurnInput


class Watchable(Spanned, Protocol):
    """What a stream can be shown: a StreamTask, or a file that is watched without expected answers."""

    @property
    def queries(self) -> tuple[TimedQuery, ...]: ...

    def chunk_of(self, time: float, chunk_seconds: float) -> int: ...


def turn_inputs(
    task: Watchable,
    clip: Clip,
    layout: Layout,
    chunk_seconds: float,
    merge_size: int,
    feature_version: int | None = None,
) -> tuple[TurnInput, ...]:
    """Return one TurnInput for each chunk of `clip`. Queries of the same chunk arrive together, each on its own line.

    Args:
        chunk_seconds: length of a chunk.
        merge_size: patches along one side of a video token.
        feature_version: weight version that encoded the clip; None if the vision side does not train.

    Raises ValueError if a query spells a control token.
    """
    t, h, w = clip.grid_thw
    grid = (t, h // merge_size, w // merge_size)
    by_turn: dict[int, QueryInput] = {}
    for query in task.queries:
        turn = task.chunk_of(query.time, chunk_seconds)
        ids = tuple(layout.query_ids(query.text))
        until: int | None = None
        if query.stay_open:
            until = NEVER if query.until is None else task.chunk_of(query.until, chunk_seconds)
        if turn in by_turn:
            before = by_turn[turn]
            ids = (*before.ids, *layout.query_ids("\n" + query.text, strip=False))
            # Queries of one turn are one block of the log: it stays until the last of them closes.
            until = max((u for u in (before.until_turn, until) if u is not None), default=None)
        by_turn[turn] = QueryInput(ids, until)
    key = clip_key(task, len(clip.frames))
    times = patch_times(len(clip.frames), t, chunk_seconds, clip.frames.shape[1])
    return tuple(
        TurnInput(
            ChunkRecord(
                turn=turn,
                video=task.video,
                frame_times=tuple(float(x) for x in clip.frame_times[turn]),
                grid=grid,
                feature=key,
                feature_version=feature_version,
                patch_times=tuple(float(x) for x in times[turn]),
            ),
            by_turn.get(turn),
            (turn * chunk_seconds, (turn + 1) * chunk_seconds),
        )
        for turn in range(len(clip.frames))
    )


def patch_times(turns: int, patches: int, chunk_seconds: float, frames_per_chunk: int) -> np.ndarray:
    """Return the seconds from the start of the stream to every temporal patch, float64 [turns, patches].

    The time of a patch is the mean of its first and its last frame's, as Qwen3-VL's processor computes it. It comes
    from the frame grid and not from the video's clock: a chunk reads the same wherever in a file the stream starts.
    """
    frames = frame_times(0.0, turns, chunk_seconds, frames_per_chunk).reshape(turns, patches, -1)
    return (frames[:, :, 0] + frames[:, :, -1]) / 2


def clip_key(task: Watchable, turns: int) -> str:
    """Return a key of the pixels that a stream sees: tasks over the same span of the same file share features."""
    return f"{task.video}:{task.start!r}:{task.end!r}:{turns}"
