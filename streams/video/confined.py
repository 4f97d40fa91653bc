"""Which file a video's path may lead to: one in the folder that confines it, and the one that its row was read with.

Invariants:
* what a path leads to is known with all symbolic links followed;
* a file outside the folder is not opened, and no message quotes what is in a file;
* pipes and devices, which could stall a reader, are told by their kind, before they are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

ANYWHERE = "/"

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def outside(video: str, root: str) -> str | None:
    """Return why a row may not name this video, None if it may. root: a resolved folder; `/` confines nothing."""
    if root == ANYWHERE:
        return None
    real = os.path.realpath(video)
    if real.startswith(f"{root}/"):
        return None
    leads = f"{video} leads to {real}" if real != os.path.normpath(video) else video
    return (
        f"{leads}, outside of {root}, where the videos of these rows must be: if the rows are to be trusted, set data.root "
        f"to the folder that holds their videos (data.root={ANYWHERE} allows any file)"
    )


def kind_refused(mode: int) -> str | None:
    """Return why something of this mode (`os.stat`) is no video file, None if it may be one."""
    if stat.S_ISREG(mode):
        return None
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "of another kind")
    return f"it is {kind}, not a video file"


class SeenFiles:
    """The files that one process has read, by their path: a file that is replaced meanwhile is noticed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def changed(self, video: str, status: os.stat_result, size: int | None) -> str | None:
        """Return how the file differs from what it was, None if it does not.

        size: bytes that it had when its row was read; None: that is not known. The time of its last change is compared
        within this process only: nodes may hold copies.
        """
        if size is not None and status.st_size != size:
            return f"the file has been replaced: it has {status.st_size} bytes, {size} when its row was read{_AGAIN}"
        stamp = status.st_size, status.st_mtime_ns
        if self._seen.setdefault(video, stamp) != stamp:
            return f"the file has been replaced or written to since it was first read{_AGAIN}"
        return None


_AGAIN = "; put it back, or start the run again to use what is there now"
