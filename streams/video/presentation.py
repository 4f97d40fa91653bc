"""What a player shows of a film file: which pictures, when, and until when.

The clock is the file's presentation clock after its edit list: `frame.time` as PyAV decodes it, not moved to the first
picture.

Invariants:
* checker, run, watch and `data.video.max_chunks` take a film's length from `presentation` alone: the end of the last
  picture that is shown, neither the header's claim nor the length of the sound;
* packets that are never shown do not count: hidden parts of an edit list, damaged ones, leading pictures without their
  reference;
* where the packets cannot tell what the decoder returns, the film is decoded.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from streams.video.confined import kind_refused

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ONE_PICTURE_A_PACKET = frozenset({"av1", "h264", "hevc", "mjpeg", "mpeg4", "prores", "vp8", "vp9"})
"""Codecs whose decoder returns one picture for every packet that is whole, decodable and meant to be shown. Films of any
other codec are decoded to know."""
NOT_CODED_BYTES = 24
"""A packet of MPEG-4 below this size may say that its picture is not coded; then the decoder returns none."""
DURATION_SLACK_S = 0.5
"""A row's end may exceed the end of the film by one frame and this much."""
NOTICED_S = 0.25
"""The first frame of a stream by default (two in each second). Films that begin with B-frames are often late by less."""
DISORDER = (
    "its frames are not decoded in the order of their times, as with some edit lists of several parts "
    "(encode it again: `ffmpeg -i IN OUT.mp4`)"
)
BEYOND_S = 1e6
"""No film lasts that long: the timestamps are nonsense."""
LENGTH_UNKNOWN = "its length cannot be read"
REMUX = "remux it: `ffmpeg -fflags +genpts -i IN -c copy OUT.mp4`"


KEPT = 4096
"""Films whose presentation a process remembers."""


class DecodeError(ValueError):
    """Why a clip cannot be read, in words for the user; the parent adds the file's name."""


@dataclass(frozen=True)
class Presentation:
    """What a player shows of a film. Times are seconds on the film's own clock.

    Attributes:
        first: when the first picture appears; below 0 if it was there before the clock starts, above 0 if it is late.
        last: when the last picture appears.
        end: when the last picture ends: the film's length.
        usual: the median distance between two pictures; 0 for a film of one picture.
        pictures: how many are shown.
    """

    first: float
    last: float
    end: float
    usual: float
    pictures: int

    @property
    def latest_end(self) -> float:
        """How late a row's `end` may be: durations are often rounded up."""
        return self.end + self.usual + DURATION_SLACK_S

    @property
    def late(self) -> bool:
        """Whether the first frames of a stream are black, by default."""
        return self.first > NOTICED_S

    def check_span(self, end: float) -> None:
        """Raise DecodeError if a stream that ends at `end` (which may be infinite) is not in this film."""
        if math.isfinite(end) and end > self.latest_end:
            raise DecodeError(
                f"the row says the clip lasts until {end:g} s "
                f"but the file holds {self.end:.2f} s ({self.pictures} frames)"
            )
        if end <= self.first:
            raise DecodeError(
                f"the clip ends at {end:g} s but the first picture of the file appears at {self.first:.2f} s: there is "
                "nothing to see (choose a later end, or start the file's clock with its picture: "
                "`ffmpeg -i IN -an -c copy -avoid_negative_ts make_zero OUT.mkv`)"
            )


_known: dict[tuple[str, int, int], Presentation] = {}


class _Shown(NamedTuple):
    """One picture: when it appears and how long it stays, in ticks of its stream. length: 0 = the file does not say."""

    at: int
    length: int


class _Packet(NamedTuple):
    """What a packet says of its picture.

    hidden: never shown, decoded for the sake of others. unclear: what the decoder makes of it takes decoding.
    """

    at: int | None
    length: int
    hidden: bool
    unclear: bool

    @classmethod
    def of(cls, packet: Packet, codec: str) -> _Packet:
        # Bit 4 of a VP8 frame's first byte: whether it is shown.
        hidden = packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] & 0x10)
        small = codec == "mpeg4" and packet.size < NOT_CODED_BYTES
        return cls(packet.pts, packet.duration or 0, hidden, packet.pts is None or packet.is_corrupt or small)


def check_container(video: str) -> str:
    """Return FFmpeg's name of the container. Raises DecodeError for what is no file, and for what may be inexact.

    MPEG-TS and MPEG-PS clocks start anywhere and may jump; AVI has no timestamps. MP4, MOV, MKV, WebM and FLV are exact.
    """
    try:
        status = os.stat(video)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    if kind := kind_refused(status.st_mode):
        raise DecodeError(kind)
    if status.st_size == 0:
        raise DecodeError("the file is empty (0 bytes)")
    try:
        with open(video, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    boxes = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
    if head[4:8] in boxes:
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"FLV"):
        return "flv"
    # What it begins with is not shown: the path may have led to any file.
    raise DecodeError(
        "not a supported video: it does not begin like MP4, MOV, MKV, WebM or FLV "
        "(other containers can be converted with `ffmpeg -i IN -c copy OUT.mkv`)"
    )


@contextmanager
def opened(video: str, failure: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and the stream that is shown. Raises DecodeError, also for what FFmpeg refuses meanwhile.

    failure: what is then impossible, the beginning of the message.
    """
    import av

    format = check_container(video)
    # FFmpeg would guess the format from the content, and some (playlists) name further files or addresses to open.
    options = {"protocol_whitelist": "file"}
    try:
        # An absolute path is never taken for a protocol ("a:b.mp4"). Titles in other encodings than UTF-8 do not matter.
        with av.open(os.path.abspath(video), format=format, options=options, metadata_errors="ignore") as container:
            yield container, _film(container)
    except MemoryError:
        raise  # FFmpeg's, too: it says nothing about the file
    except av.FFmpegError as error:
        raise refused(failure, error) from None


def refused(failure: str, error: Exception) -> DecodeError:
    """FFmpeg's error in words. failure: what is impossible, the beginning of the message."""
    return DecodeError(f"{failure}, the file is truncated or damaged ({short(error)})")


def _film(container: InputContainer) -> VideoStream:
    """The stream that a player shows: FFmpeg's choice of those that are no cover pictures. It decodes in one thread."""
    from av.stream import Disposition

    films = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not films:
        cover = " but a cover picture" if container.streams.video else ""
        raise DecodeError(f"it holds no video{cover}")
    best = container.streams.best("video")
    stream = next((one for one in films if best is not None and one.index == best.index), films[0])
    if stream.codec_context is None:
        raise DecodeError("its codec is not known to FFmpeg")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return stream


class Survey:
    """Reads a film once: decodes it as far as it is asked to, and learns from all its packets what is shown when."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        self._demuxed = container.demux(stream)
        self._codec = stream.codec_context.codec.canonical_name
        self._packets: list[_Packet] = []
        self._head: int | None = None
        self._whole = False

    def _next(self) -> Iterator[Packet]:
        for packet in self._demuxed:
            if packet.size:
                # Not the packet itself: its payload would stay in memory.
                self._packets.append(_Packet.of(packet, self._codec))
            else:
                self._whole = True  # the empty packet at the end of the file
            yield packet

    def frames(self) -> Iterator[VideoFrame]:
        """The frames that the decoder returns, in its order. Raises what FFmpeg does, and DecodeError."""
        for packet in self._next():
            for frame in self._stream.decode(packet):
                if self._head is None:
                    self._head = _ticks(frame)
                yield frame

    def presentation(self, video: str) -> Presentation:
        """What is shown, after reading the rest. Raises DecodeError."""
        known = _known.get(_key(video))
        if known is not None:
            return known
        if self._head is None:
            next(self.frames(), None)
        for _ in self._next():
            pass
        if not self._whole:
            raise DecodeError("it cannot be read to its end, the file is truncated or damaged")
        shown = _from_packets(self._packets, self._head, self._codec)
        if shown is None:
            shown = _from_decoder(video)
        if not shown:
            hidden = any(packet.hidden for packet in self._packets)
            raise DecodeError(
                "its edit list hides every picture (remux it: `ffmpeg -ignore_editlist 1 -i IN -c copy OUT.mp4`)"
                if hidden
                else "it holds no picture that can be decoded, the file is truncated or damaged"
            )
        if len(_known) >= KEPT:
            _known.clear()
        rate = self._stream.guessed_rate
        found = _known[_key(video)] = _summary(shown, self._stream.time_base or Fraction(0), 1 / rate if rate else None)
        return found


def _key(video: str) -> tuple[str, int, int]:
    try:
        status = os.stat(video)
    except OSError as error:
        raise DecodeError(f"the file cannot be read ({error.strerror})") from None
    return video, status.st_mtime_ns, status.st_size


def presentation(video: str) -> Presentation:
    """What a player shows of the file; kept until the file changes. Raises DecodeError."""
    known = _known.get(_key(video))
    if known is None:
        with opened(video, LENGTH_UNKNOWN) as (container, stream):
            known = Survey(container, stream).presentation(video)
    return known


def forget() -> None:
    """Look at every file anew (to measure how long that takes)."""
    _known.clear()


def _summary(shown: list[_Shown], tick: Fraction, frame_s: Fraction | None) -> Presentation:
    """tick: seconds. frame_s: how long a frame lasts at the rate that FFmpeg takes the film to have, None if it has none."""
    shown = sorted(shown)
    gaps = [after.at - before.at for before, after in pairwise(shown)]
    usual = Fraction(statistics.median(gaps)) if gaps else Fraction(0)
    # Some files give the last picture no length; the usual distance between pictures stands in. FLV gives a film of one
    # picture no length at all: without any, nothing could be shown of it.
    end = shown[-1].at + (shown[-1].length or usual or (frame_s / tick if frame_s and tick else 1))
    found = Presentation(
        first=float(shown[0].at * tick),
        last=float(shown[-1].at * tick),
        end=float(end * tick),
        usual=float(usual * tick),
        pictures=len(shown),
    )
    if not (tick > 0 and found.first > -BEYOND_S and found.end < BEYOND_S):
        raise DecodeError(f"its frames have no usable timestamps ({REMUX})")
    return found


def _from_packets(packets: list[_Packet], head: int | None, codec: str) -> list[_Shown] | None:
    """What the decoder makes of these packets, in the order of the file; None where that takes decoding.

    head: when the first picture appears that it returned.
    """
    shown = [_Shown(packet.at, packet.length) for packet in packets if packet.at is not None and not packet.hidden]
    times = {picture.at for picture in shown}
    first, last = min(times, default=None), max(times, default=0)
    # An edit list of several parts hides packets between those that it shows. At such a seam the decoder may lose pictures,
    # or return them out of order.
    parts = first is not None and any(
        packet.hidden and packet.at is not None and first < packet.at < last for packet in packets
    )
    if (
        codec not in ONE_PICTURE_A_PACKET
        or any(packet.unclear for packet in packets)
        # Two packets of one time may be two fields of one picture.
        or len(times) != len(shown)
        # Without a key frame, or the reference that an open GOP begins with, a decoder passes over the first packets.
        or head != first
        or parts
    ):
        return None
    return shown


def _from_decoder(video: str) -> list[_Shown]:
    """The pictures that the decoder returns, up to the first that it refuses."""
    shown: list[_Shown] = []
    try:
        with opened(video, LENGTH_UNKNOWN) as (container, stream):
            shown.extend(_Shown(_ticks(frame), frame.duration or 0) for frame in container.decode(stream))
    except DecodeError:
        if not shown:
            raise
    if shown != sorted(shown, key=lambda picture: picture.at):
        raise DecodeError(DISORDER)
    return shown


def _ticks(frame: VideoFrame) -> int:
    if frame.pts is None:
        raise DecodeError(f"its frames have no usable timestamps ({REMUX})")
    return int(frame.pts)


def short(error: BaseException) -> str:
    """The last statement of an FFmpeg message, without the path."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split(": '")[0]
    return " ".join(text.split())[-160:] or type(error).__name__
