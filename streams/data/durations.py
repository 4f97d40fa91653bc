"""How long the videos are, for tasks whose rows do not say.

Lengths are measured only where something depends on them (`data.video.max_chunks`, `python -m streams.data.check`):
every video is read to its end, which takes a while for a large file.

Invariants:
* a length is that of `streams.video.presentation`, as in a run;
* a video is measured once;
* one that cannot be read costs its tasks, each with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from streams.task import StreamTask
from streams.video.config import VideoConfig
from streams.video.presentation import Presentation
from streams.video.reader import ClipReader, VideoError

END_SLACK_S = 1.0
"""Items up to this many seconds after the video's end belong to its last chunk: timestamps are often rounded up."""
_LAST_INSTANT_S = 1e-3

_known: dict[tuple[str, int, int], Presentation] = {}


def bounded(task: StreamTask, video_seconds: float) -> StreamTask:
    """Return the task with the video's length as its end.

    Raises ValueError for an item more than `END_SLACK_S` after that end, or a stream that starts after it.
    """
    if not (math.isfinite(video_seconds) and video_seconds > task.start):
        raise ValueError(f"the video lasts {video_seconds:g} s, the stream starts at {task.start:g} s")
    last = max(task.start, video_seconds - _LAST_INSTANT_S)

    def inside(time: float, what: str) -> float:
        if time > video_seconds + END_SLACK_S:
            raise ValueError(f"{what} at {time:g} s lies after the end of the video ({video_seconds:g} s)")
        return min(time, last)

    queries = (replace(query, time=inside(query.time, f"queries[{i}]")) for i, query in enumerate(task.queries))
    answers = (replace(answer, time=inside(answer.time, f"answers[{i}]")) for i, answer in enumerate(task.answers))
    thoughts = (replace(item, time=inside(item.time, f"thoughts[{i}]")) for i, item in enumerate(task.thoughts))
    return replace(task, end=video_seconds, queries=tuple(queries), answers=tuple(answers), thoughts=tuple(thoughts))


Source = TypeVar("Source")


def measured(
    tasks: Iterable[tuple[Source, StreamTask]], video: VideoConfig, bad: Callable[[Source, str], None]
) -> Iterator[tuple[Source, StreamTask]]:
    """Yield the tasks, with the video's length as the end of those without one; hand those that fail to `bad`."""
    failed: dict[str, str] = {}
    with ClipReader(video) as reader:
        for source, task in tasks:
            if math.isfinite(task.end):
                yield source, task
                continue
            if task.video not in failed:
                try:
                    fitted = bounded(task, known_presentation(reader, task.video).end)
                except VideoError as error:
                    failed[task.video] = str(error)
                except ValueError as error:
                    bad(source, f"{task.video}: {error}")
                    continue
                else:
                    yield source, fitted
                    continue
            bad(source, failed[task.video])


def known_presentation(reader: ClipReader, video: str) -> Presentation:
    """Return what a player shows of the video; it is read again only when the file has changed. Raises VideoError."""
    try:
        status = os.stat(video)
        key = (video, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise VideoError(video, f"the file cannot be read ({error.strerror})") from None
    if key not in _known:
        _known[key] = reader.presentation(video)
    return _known[key]
