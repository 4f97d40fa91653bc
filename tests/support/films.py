"""Generated films for tests of the clock: what encoders, muxers and cutting tools do to times, in a few small frames each."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

SIDE = 64  # x265 writes beyond its buffers in smaller pictures with B-frames
MS = Fraction(1, 1000)
X264 = {"preset": "veryfast", "crf": "20"}
B_FRAMES = X264 | {"x264-params": "bframes=3:b-adapt=0:b-pyramid=strict"}
OPEN_GOP = X264 | {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=8:min-keyint=8:scenecut=0"}
X265 = "log-level=none:pools=1:frame-threads=1"
OPEN_X265 = {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1:bframes=3:b-adapt=0:keyint=8:min-keyint=8"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
EVEN = [100 * i for i in range(24)]
UNEVEN = [0, 40, 80, 300, 333, 366, 900, 1000, 1010, 1500, 1700, 1703, 1950, 2000, 2400, 2900, 2933, 3000]
SCREEN = [0, 700, 1900, 2000, 2050, 2600, 5000]


@functools.cache
def pictures(count: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Return moving coloured noise, uint8 [count, height, width, 3]; no two pictures are equal."""
    rng = np.random.default_rng(0)
    noise = rng.integers(30, 200, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    plain = noise.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return np.stack([np.roll(plain, 3 * i, axis=1) + np.uint8(2 * i) for i in range(count)])


def write_film(
    path: Path,
    times: Sequence[int] = EVEN,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (SIDE, SIDE),
    muxer: dict[str, str] | None = None,
    sound_s: float = 0.0,
    colour: tuple[int, int] | None = None,
    title: str = "",
    more: Callable[[av.container.OutputContainer], list[av.Packet]] | None = None,
) -> Path:
    """Write a film whose pictures appear at `times` (milliseconds).

    size: (height, width). colour: (colorspace, range). sound_s: seconds of silence beside it. more: other streams.
    """
    with av.open(str(path), "w", options=muxer or {}) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = MS
        stream.codec_context.thread_count = 1
        stream.options = X264 if options is None else options
        kwargs = {}
        if colour:
            stream.codec_context.colorspace, stream.codec_context.color_range = colour
            kwargs = {"dst_colorspace": colour[0], "dst_color_range": colour[1], "src_color_range": 2}
        sound = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000) if sound_s else None
        packets = more(container) if more else []
        for image, time in zip(pictures(len(times), *size), times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt, **kwargs)
            frame.pts, frame.time_base = time, MS
            packets += stream.encode(frame)
        packets += stream.encode()
        if sound is not None:
            packets += silence(sound, sound_s)
        container.start_encoding()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def silence(stream, seconds: float) -> list[av.Packet]:
    packets = []
    for i in range(round(seconds * 48000) // 960):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 960 * i, Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets + stream.encode()


def copied(
    source: Path,
    path: Path,
    *,
    shift_s: float = 0.0,
    keep: Callable[[int, av.Packet], bool] = lambda index, packet: True,
    muxer: dict[str, str] | None = None,
    rotation: int | None = None,
) -> Path:
    """Copy `source` without encoding it again: the packets that `keep` names, all times later by `shift_s`."""
    with av.open(str(source)) as read, av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream_from_template(read.streams.video[0], opaque=True)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index, packet in enumerate(read.demux(video=0)):
            if not packet.size or not keep(index, packet):
                continue
            assert packet.pts is not None, "copy from MP4: Matroska does not give every packet a decoding time"
            assert packet.dts is not None
            ticks = round(shift_s / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
            container.mux(packet)
    return path


def from_key(source: Path, path: Path, number: int, more: int = 0) -> Path:
    """Copy `source` from its key frame `number` on, or from `more` packets after it."""
    with av.open(str(source)) as read:
        keys = [i for i, packet in enumerate(read.demux(video=0)) if packet.is_keyframe]
    return copied(source, path, keep=lambda index, _: index >= keys[number] + more)


def cut(source: Path, path: Path, at_s: float, muxer: dict[str, str] | None = None) -> Path:
    """Write what `ffmpeg -ss AT -i SOURCE -c copy` leaves: from the key frame before, the beginning hidden by an edit list."""
    with av.open(str(source)) as read:
        packets = [packet for packet in read.demux(video=0) if packet.size]
        first = max(
            i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts * packet.time_base <= at_s
        )
    return copied(source, path, shift_s=-at_s, keep=lambda index, _: index >= first, muxer=muxer)


def joined(first: Path, second: Path, path: Path) -> Path:
    """Join two H.264 MP4s; the second has its parameter sets in its first packet."""
    with av.open(str(first)) as one, av.open(str(second)) as two, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(one.streams.video[0])
        end = 0
        for packet in one.demux(video=0):
            if packet.size:
                end, packet.stream = max(end, packet.dts + (packet.duration or 1)), stream
                container.mux(packet)
        for packet in two.demux(video=0):
            if packet.size:
                sets = parameter_sets(two.streams.video[0].codec_context.extradata) if packet.is_keyframe else b""
                copy = av.Packet(sets + bytes(packet))
                copy.pts, copy.dts, copy.duration = packet.pts + end, packet.dts + end, packet.duration
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                container.mux(copy)
    return path


def parameter_sets(extradata: bytes) -> bytes:
    """Return the sequence and picture parameter sets of an `avcC` box, each with its length in front."""
    size = int.from_bytes(extradata[6:8], "big")
    sequence, rest = extradata[8 : 8 + size], extradata[9 + size :]
    picture = rest[2 : 2 + int.from_bytes(rest[:2], "big")]
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in (sequence, picture))


# ---- boxes of MP4 ----

PARENTS = (b"moov", b"trak", b"mdia", b"edts", b"minf", b"stbl")


def boxes(data: bytes, start: int, stop: int) -> Iterable[tuple[bytes, int, int]]:
    """Yield (name, start, end) of every box, parents before their children."""
    while start < stop:
        size, name = struct.unpack_from(">I4s", data, start)
        yield name, start, start + size
        if name in PARENTS:
            yield from boxes(data, start + 8, start + size)
        start += size


def with_edits(source: Path, path: Path, edits: Sequence[tuple[float, float]]) -> Path:
    """Give an MP4 (its index at the end) another edit list: (seconds, seconds into the media; -1 = nothing to see)."""
    data = source.read_bytes()
    found = list(boxes(data, 0, len(data)))
    assert [name for name, _, _ in found].index(b"moov") > [name for name, _, _ in found].index(b"mdat")
    scales = {}
    for name, start, _ in found:
        if name in (b"mvhd", b"mdhd"):
            scales[name] = struct.unpack_from(">I", data, start + 20)[0]
    entries = b"".join(
        struct.pack(">Iihh", round(length * scales[b"mvhd"]), -1 if begin < 0 else round(begin * scales[b"mdhd"]), 1, 0)
        for length, begin in edits
    )
    old = next((start, end) for name, start, end in found if name == b"elst")
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    made = bytearray(data)
    for name, start, end in found:
        if name in PARENTS and start < old[0] < end:
            struct.pack_into(">I", made, start, end - start + len(new) - (old[1] - old[0]))
    made[old[0] : old[1]] = new
    path.write_bytes(made)
    return path


def with_durations(source: Path, path: Path, factor: float) -> Path:
    """Make the headers of an MP4 lie about its length; the edit list stays."""
    data = bytearray(source.read_bytes())
    for name, start, _ in list(boxes(bytes(data), 0, len(data))):
        if name in (b"mvhd", b"mdhd", b"tkhd"):
            at = start + (28 if name == b"tkhd" else 24)
            struct.pack_into(">I", data, at, int(struct.unpack_from(">I", data, at)[0] * factor))
    path.write_bytes(data)
    return path


def with_matrix(source: Path, path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Give an MP4 another display matrix: a point (x, y) of the picture is shown at (ax + cy, bx + dy)."""
    data = bytearray(source.read_bytes())
    for name, start, _ in list(boxes(bytes(data), 0, len(data))):
        if name == b"tkhd":
            struct.pack_into(">9i", data, start + 48, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def earlier(source: Path, path: Path, by_s: float) -> Path:
    """Make the pictures of an MP4 without an edit list appear earlier, the first ones before 0 s."""
    data = bytearray(source.read_bytes())
    found = {name: start for name, start, _ in boxes(bytes(data), 0, len(data))}
    ticks = round(by_s * struct.unpack_from(">I", data, found[b"mdhd"] + 20)[0])
    data[found[b"ctts"] + 8] = 1  # the version with signed offsets
    for i in range(struct.unpack_from(">I", data, found[b"ctts"] + 12)[0]):
        at = found[b"ctts"] + 20 + 8 * i
        struct.pack_into(">i", data, at, struct.unpack_from(">i", data, at)[0] - ticks)
    path.write_bytes(data)
    return path


def without_picture(source: Path, path: Path, index: int) -> Path:
    """Change packet `index` of an HEVC film so that decoders skip it: its unit gets a type without a meaning."""
    with av.open(str(source)) as read:
        packet = [packet for packet in read.demux(video=0) if packet.size][index]
    data = bytearray(source.read_bytes())
    data[packet.pos + 4] = 48 << 1
    path.write_bytes(data)
    return path


def unshown(source: Path, path: Path, index: int) -> Path:
    """Change packet `index` of a VP8 film so that it is decoded but not shown, as a reference frame for others."""
    with av.open(str(source)) as read, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(read.streams.video[0])
        for i, packet in enumerate(read.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if i == index else 0xFF
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.duration, copy.stream = packet.is_keyframe, packet.duration, stream
                container.mux(copy)
    return path


def cover(container: av.container.OutputContainer) -> list[av.Packet]:
    """Add a cover picture beside the film."""
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
    stream.disposition = Disposition.attached_pic
    return one_picture(stream, 240, 320)


def second_film(container: av.container.OutputContainer) -> list[av.Packet]:
    """Add another, smaller film of one picture."""
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    return one_picture(stream, 32, 32)


def one_picture(stream, height: int, width: int) -> list[av.Packet]:
    frame = av.VideoFrame.from_ndarray(pictures(1, height, width)[0], format="rgb24").reformat(format=stream.pix_fmt)
    frame.pts, frame.time_base = 0, MS
    return stream.encode(frame) + stream.encode()
