"""A table of made films, frame by frame: what a player shows when, and one length for all who ask.

The reference is PyAV's own decoding: each frame with its presentation time, as `to_ndarray(format="rgb24")` gives it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.data.check import main
from streams.data.dataset import load_tasks
from streams.task import Plan
from streams.video.config import VideoConfig
from streams.video.reader import ClipReader, VideoError
from tests.support.configs import composed
from tests.support.films import (
    B_FRAMES,
    EVEN,
    FRAGMENTS,
    OPEN_GOP,
    OPEN_X265,
    SCREEN,
    SIDE,
    UNEVEN,
    X264,
    X265,
    copied,
    cover,
    cut,
    earlier,
    from_key,
    joined,
    second_film,
    silence,
    unshown,
    with_durations,
    with_edits,
    with_matrix,
    without_picture,
    write_film,
)

LONG = B_FRAMES | {"g": "250"}
SHORT = X264 | {"g": "4", "bf": "0"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
VP8 = {"deadline": "realtime", "cpu-used": "8", "b": "100k"}
HEVC = {"preset": "ultrafast", "x265-params": X265}
LATE = [2000 + time for time in EVEN]

Source = Callable[[str], Path]
FILMS: dict[str, Callable[[Path, Source], object]] = {
    # Ordinary ones.
    "plain.mp4": lambda to, _: write_film(to),
    "plain.mov": lambda to, _: write_film(to),
    "plain.mkv": lambda to, _: write_film(to),
    "plain.flv": lambda to, _: write_film(to, options=SHORT),
    "bframes.mp4": lambda to, _: write_film(to, options=LONG),
    "bframes.mkv": lambda to, _: write_film(to, options=LONG),
    "bframes.flv": lambda to, _: write_film(to, options=LONG),
    "short.mp4": lambda to, _: write_film(to, options=SHORT),
    "hevc.mp4": lambda to, _: write_film(to, codec="libx265", options=HEVC),
    "vp9.webm": lambda to, _: write_film(to, codec="libvpx-vp9", options=VP9),
    "vp8.webm": lambda to, _: write_film(to, codec="libvpx", options=VP8),
    "av1.webm": lambda to, _: write_film(to, codec="libsvtav1", options={"preset": "13"}),
    "prores.mov": lambda to, _: write_film(to, codec="prores_ks", options={}, pix_fmt="yuv422p10le"),
    "mjpeg.mov": lambda to, _: write_film(to, codec="mjpeg", options={}, pix_fmt="yuvj420p"),
    "exif.mov": lambda to, _: write_film(to, codec="tiff", options={}, pix_fmt="rgb24"),
    "mpeg4.mp4": lambda to, _: write_film(to, codec="mpeg4", options={"bf": "2"}),
    # Pixels.
    "ten_bit.mp4": lambda to, _: write_film(to, pix_fmt="yuv420p10le"),
    "ten_bit_hevc.mkv": lambda to, _: write_film(to, codec="libx265", options=HEVC, pix_fmt="yuv420p10le"),
    "full_colour.mp4": lambda to, _: write_film(to, pix_fmt="yuv444p"),
    "full_range.mp4": lambda to, _: write_film(to, colour=(5, 2)),
    "bt709.mp4": lambda to, _: write_film(to, colour=(1, 1)),
    "grey.mp4": lambda to, _: write_film(to, pix_fmt="gray"),
    "odd.mp4": lambda to, _: write_film(to, pix_fmt="yuv444p", size=(57, 35)),
    "turned90.mp4": lambda to, source: copied(source("wide.mp4"), to, rotation=90),
    "turned180.mov": lambda to, source: copied(source("wide.mp4"), to, rotation=180),
    "turned270.mkv": lambda to, source: copied(source("wide.mp4"), to, rotation=-90),
    "wide.mp4": lambda to, _: write_film(to, size=(SIDE, 2 * SIDE)),
    # Rates and counts.
    "uneven.mp4": lambda to, _: write_film(to, UNEVEN, options=B_FRAMES),
    "uneven.mov": lambda to, _: write_film(to, UNEVEN, options=SHORT),
    "uneven.mkv": lambda to, _: write_film(to, UNEVEN, options=B_FRAMES),
    "uneven.flv": lambda to, _: write_film(to, UNEVEN, options=B_FRAMES),
    "screen.mp4": lambda to, _: write_film(to, SCREEN),
    "screen.webm": lambda to, _: write_film(to, SCREEN, codec="libvpx-vp9", options=VP9),
    "one.mp4": lambda to, _: write_film(to, [0]),
    "one.mkv": lambda to, _: write_film(to, [0]),
    "one.flv": lambda to, _: write_film(to, [0]),
    "keys.mp4": lambda to, _: write_film(to, UNEVEN, options=B_FRAMES | {"g": "6"}),
    "two.mp4": lambda to, _: write_film(to, [0, 100]),
    # Cuts that hide their beginning.
    "cut_even.mp4": lambda to, source: cut(source("bframes.mp4"), to, 0.45),
    "cut_late.mp4": lambda to, source: cut(source("bframes.mp4"), to, 1.95),
    "cut_last.mp4": lambda to, source: cut(source("bframes.mp4"), to, 2.25),
    "cut_short.mp4": lambda to, source: cut(source("short.mp4"), to, 1.05),
    "cut_uneven.mp4": lambda to, source: cut(source("uneven.mp4"), to, 0.35),
    "cut_uneven_late.mov": lambda to, source: cut(source("uneven.mov"), to, 1.601),
    "cut_hevc.mp4": lambda to, source: cut(source("hevc.mp4"), to, 0.75),
    "cut_av1.mp4": lambda to, source: cut(source("av1.mp4"), to, 1.03),
    "av1.mp4": lambda to, _: write_film(to, codec="libsvtav1", options={"preset": "13", "svtav1-params": "keyint=8"}),
    "cut_matroska.mkv": lambda to, source: cut(source("uneven.mp4"), to, 0.35),
    "cut_twice.mp4": lambda to, source: cut(source("cut_uneven.mp4"), to, 0.9),
    # Edit lists: hidden tails, parts, a late start.
    "tail.mp4": lambda to, source: with_edits(source("bframes.mp4"), to, [(1.0, 0.2)]),
    "tail_short.mp4": lambda to, source: with_edits(source("short.mp4"), to, [(1.15, 0.0)]),
    "middle.mp4": lambda to, source: with_edits(source("bframes.mp4"), to, [(0.8, 0.7)]),
    "parts.mp4": lambda to, source: with_edits(source("short.mp4"), to, [(0.5, 0.2), (0.7, 1.2)]),
    "swapped.mp4": lambda to, source: with_edits(source("short.mp4"), to, [(0.5, 1.2), (0.7, 0.4)]),
    "parts_hevc.mp4": lambda to, source: with_edits(source("open_hevc.mp4"), to, [(0.7, 0.35), (0.7, 1.35)]),
    "nothing_first.mp4": lambda to, source: with_edits(source("bframes.mp4"), to, [(0.5, -1), (1.0, 0.2)]),
    # Open GOPs, whole and cut.
    "open.mp4": lambda to, _: write_film(to, options=OPEN_GOP),
    "open.mkv": lambda to, _: write_film(to, options=OPEN_GOP),
    "open_hevc.mp4": lambda to, _: write_film(to, codec="libx265", options=OPEN_X265),
    "open_cut.mp4": lambda to, source: from_key(source("open.mp4"), to, 1),
    "open_cut.mkv": lambda to, source: from_key(source("open.mp4"), to, 1),
    "open_hevc_cut.mp4": lambda to, source: from_key(source("open_hevc.mp4"), to, 1),
    "open_hevc_cut.mkv": lambda to, source: from_key(source("open_hevc.mp4"), to, 1),
    "no_key.mkv": lambda to, source: from_key(source("open.mp4"), to, 0, 3),
    "refresh_cut.mp4": lambda to, source: from_key(source("refresh.mp4"), to, 1),
    "refresh.mp4": lambda to, _: write_film(to, options=X264 | {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}),
    # Starts and sounds.
    "negative.mp4": lambda to, source: earlier(source("no_list.mp4"), to, 0.45),
    "no_list.mp4": lambda to, _: write_film(to, options=B_FRAMES, muxer={"use_editlist": "0"}),
    "late.mp4": lambda to, _: write_film(to, LATE, sound_s=5.0),
    "late.mkv": lambda to, _: write_film(to, LATE, sound_s=5.0),
    "late.flv": lambda to, _: write_film(to, LATE, options=SHORT, sound_s=5.0),
    "late_silent.mp4": lambda to, source: copied(source("short.mp4"), to, shift_s=1.5),
    "sound.mp4": lambda to, _: write_film(to, sound_s=6.0),
    "sound.mkv": lambda to, _: write_film(to, sound_s=6.0),
    "sound.webm": lambda to, _: write_film(to, codec="libvpx-vp9", options=VP9, sound_s=6.0),
    # Fragments.
    "fragments.mp4": lambda to, _: write_film(to, options=B_FRAMES | {"g": "8"}, muxer=FRAGMENTS),
    "fragments_cut.mp4": lambda to, source: cut(source("bframes.mp4"), to, 0.45, FRAGMENTS),
    "cut_fragments.mp4": lambda to, source: cut(source("fragments.mp4"), to, 0.95),
    "fragments_uneven.mp4": lambda to, _: write_film(to, UNEVEN, options=SHORT, muxer=FRAGMENTS),
    # Headers that lie, other pictures, a picture that the decoder loses.
    "ten_times.mp4": lambda to, source: with_durations(source("bframes.mp4"), to, 10),
    "half.mp4": lambda to, source: with_durations(source("bframes.mp4"), to, 0.5),
    "no_length.mp4": lambda to, source: with_durations(source("bframes.mp4"), to, 0),
    "unshown.webm": lambda to, source: unshown(source("vp8.webm"), to, 9),
    "unshown_last.webm": lambda to, source: unshown(source("vp8.webm"), to, 23),
    "cover.mp4": lambda to, _: write_film(to, more=cover),
    "second.mkv": lambda to, _: write_film(to, more=second_film),
    "lost.mp4": lambda to, source: without_picture(source("open_hevc.mp4"), to, 6),
}
ORDINARY = [*list(FILMS)[:16], "uneven.mp4", "screen.webm", "sound.mkv", "turned90.mp4", "turned180.mov"]
RESIZED = {"odd.mp4"}


@pytest.fixture(scope="session")
def film(tmp_path_factory) -> Source:
    """Makes a film of the table by name, once."""
    folder = tmp_path_factory.mktemp("films")

    @functools.cache
    def made(name: str) -> Path:
        FILMS[name](folder / name, made)
        return folder / name

    return made


@pytest.fixture(scope="module")
def reader():
    """Every size of the table is read as it is: sides are multiples of 4, but for RESIZED."""
    with ClipReader(VideoConfig(min_pixels=1, max_pixels=10**6), patch_size=2, merge_size=2) as shared:
        yield shared


def decoded(path: Path) -> list[tuple[float, float, np.ndarray]]:
    """(time, end, pixels) of every frame that PyAV returns, upright as a player shows it."""
    with av.open(str(path)) as container:
        return [
            (frame.time, float((frame.pts + (frame.duration or 0)) * frame.time_base), upright(frame))
            for frame in container.decode(container.streams.video[0])
        ]


def upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def same(found: np.ndarray, name: str, pixels: np.ndarray) -> bool:
    if name not in RESIZED:
        return np.array_equal(found, pixels)
    return found.shape == (56, 36, 3)


def shown_at(frames: list[tuple[float, float, np.ndarray]], time: float) -> np.ndarray:
    """The last frame that had appeared by then (to a millisecond); black before the first."""
    return next((pixels for at, _, pixels in reversed(frames) if at <= time + 1e-3), np.zeros_like(frames[0][2]))


def test_the_table_is_long_enough():
    assert len(FILMS) >= 40


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_of_every_film(name, film, reader):
    frames = decoded(film(name))
    end = frames[-1][1]
    # 40 times a second, from the beginning and from the middle of the film.
    for start in (0.0, max(0.0, math.floor(end * 10 / 2) / 10)):
        clip = reader.read(str(film(name)), start, math.inf, math.ceil((end - start) / 0.05 + 2), chunk_seconds=0.05)
        wrong = [
            time
            for time, picture in zip(
                clip.frame_times.ravel(), clip.frames.reshape(-1, *clip.frames.shape[2:]), strict=True
            )
            if not same(picture, name, shown_at(frames, time))
        ]
        assert not wrong, f"{name}: {wrong}"
        # All of the film and nothing more.
        assert start + 0.05 * (len(clip.frames) - 1) < reader.duration(str(film(name)))
        assert start + 0.05 * len(clip.frames) >= reader.duration(str(film(name))) - 1e-6


@pytest.mark.parametrize("name", FILMS)
def test_the_length_is_the_end_of_the_last_picture(name, film, reader):
    frames = decoded(film(name))
    found = reader.presentation(str(film(name)))
    assert (found.first, found.last) == (frames[0][0], frames[-1][0])
    assert found.pictures == len(frames) + (3 if name == "lost.mp4" else 0)
    usual = float(np.median(np.diff([at for at, _, _ in frames]))) if len(frames) > 1 else 0.1
    end = frames[-1][1] if frames[-1][1] > frames[-1][0] else frames[-1][0] + usual
    assert found.end == pytest.approx(end, abs=1e-3)
    assert found.end > 0


def test_times_are_those_that_the_films_were_made_with(film):
    for name, times in (("uneven.mp4", UNEVEN), ("uneven.flv", UNEVEN), ("screen.webm", SCREEN), ("late.mkv", LATE)):
        late = 0.0 if name != "uneven.flv" else decoded(film(name))[0][0]
        found = [at - late for at, _, _ in decoded(film(name))]
        np.testing.assert_allclose(found, np.array(times) / 1000, atol=0.03)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_films_have_the_pixels_of_decord(name, film, reader):
    """decord's frames, in their order, were what a model saw before; rows padded at awkward widths are cut."""
    frames = decoded(film(name))
    former = decord.VideoReader(str(film(name)), num_threads=1)
    assert len(former) == len(frames)
    for _, _, pixels in frames:
        raw = former.next().asnumpy()
        height, width, channels = raw.shape
        assert np.array_equal(raw.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3), pixels)


# ---- random films ----


@st.composite
def random_films(draw):
    gaps = draw(st.lists(st.integers(1, 700), min_size=1, max_size=16))
    bframes = draw(st.integers(0, 3))
    gop = draw(st.integers(1, 20))
    open_gop = draw(st.booleans())
    params = f"bframes={bframes}:b-adapt=0:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop={int(open_gop)}"
    times = np.concatenate([[0], np.cumsum(gaps)]).tolist()
    at = draw(st.integers(0, times[-1])) / 1000
    suffix = draw(st.sampled_from([".mp4", ".mov", ".mkv", "fragments.mp4"]))
    return times, X264 | {"x264-params": params}, at, suffix


@settings(max_examples=40, deadline=None)
@given(random_films(), st.sampled_from([0.03, 0.17, 0.5, 1.0]), st.sampled_from([2, 4]))
def test_no_frame_is_ever_later_than_asked(tmp_path_factory, made, seconds, per_chunk):
    times, options, at, suffix = made
    folder = tmp_path_factory.mktemp("random")
    whole = write_film(folder / "whole.mp4", times, options=options)
    part = cut(whole, folder / f"part{suffix}", at, FRAGMENTS if suffix.startswith("fragments") else None)
    config = VideoConfig(frames_per_chunk=per_chunk, min_pixels=1, max_pixels=10**6)
    with ClipReader(config, patch_size=2, merge_size=2) as reader:
        for path in (whole, part):
            frames = decoded(path)
            count = math.ceil((frames[-1][0] + 1) / seconds)
            clip = reader.read(str(path), 0.0, math.inf, count, chunk_seconds=seconds)
            shown = clip.frames.reshape(-1, SIDE, SIDE, 3)
            for time, picture in zip(clip.frame_times.ravel(), shown, strict=True):
                came = [appeared for appeared, _, pixels in frames if np.array_equal(pixels, picture)]
                assert not came or min(came) <= time + 1e-3
                assert np.array_equal(picture, shown_at(frames, time))


# ---- one length ----

ANYWHERE = ("--root", "/")
"""The films lie in a folder of their own."""


def row(name: str, video: Path, end: float | None = None) -> dict:
    found = {"id": name, "video": str(video), "queries": [{"time": 0.0, "text": "q"}]}
    found["answers"] = [{"time": 0.01, "text": "3", "kind": "integer"}]
    return found if end is None else found | {"end": end}


def rows(path: Path, *found: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def test_checker_run_watch_and_max_chunks_agree_on_every_length(film, reader, tmp_path, capsys):
    path = rows(tmp_path / "rows.jsonl", *(row(name, film(name)) for name in FILMS))
    assert main([str(path), *ANYWHERE, "--write", str(tmp_path / "written.jsonl")]) == 0, capsys.readouterr().out
    unwritten = load_tasks(path, on_bad="raise", root="/").tasks
    written = load_tasks(tmp_path / "written.jsonl", on_bad="raise", root="/").tasks
    planned = load_tasks(path, on_bad="raise", video=VideoConfig(max_chunks=3), root="/").tasks
    assert [task.id for task in unwritten] == [task.id for task in written] == [task.id for task in planned]
    for before, task, plan in zip(unwritten, written, planned, strict=True):
        assert task.end == plan.end == reader.duration(task.video), task.id
        turns = task.num_turns(1.0, 100, 1000)
        assert turns == math.ceil(task.end - 1e-6)
        assert len(reader.read_task(task, Plan(turns, 1.0)).frames) == turns
        assert len(reader.read_task(before, Plan(100, 1.0)).frames) == turns, task.id


@pytest.mark.parametrize("name", ["cut_last.mp4", "sound.mkv", "sound.webm", "tail.mp4", "ten_times.mp4", "late.mp4"])
def test_a_row_longer_than_its_film_is_refused_by_checker_and_run_in_the_same_words(
    name, film, reader, tmp_path, capsys
):
    frames = decoded(film(name))
    too_long = rows(tmp_path / "rows.jsonl", row("long", film(name), end=10.0), row("fits", film("plain.mp4")))
    assert main([str(too_long), *ANYWHERE]) == 1
    said = f"the row says the clip lasts until 10 s but the file holds {frames[-1][1]:.2f} s ({len(frames)} frames)"
    assert f"task long ({film(name)}): {said}" in capsys.readouterr().out
    task = load_tasks(too_long, root="/").tasks[0]
    with pytest.raises(VideoError) as caught:
        reader.read_task(task, Plan(task.num_turns(1.0, 100, 1000), 1.0))
    assert str(caught.value) == f"{film(name)}: {said}"


@pytest.mark.parametrize("seconds", [0.1, 0.25, 1.0])
def test_an_end_that_the_checker_accepts_is_read_to_its_last_chunk(seconds, film, reader, tmp_path):
    """Durations are often rounded up: half a second and a frame more than there is are allowed, in short chunks, too."""
    path = rows(tmp_path / "rows.jsonl", row("rounded", film("plain.mp4"), end=2.95))
    assert main([str(path), *ANYWHERE]) == 0
    (task,) = load_tasks(path, root="/").tasks
    with ClipReader(VideoConfig(chunk_seconds=seconds)) as short:
        turns = task.num_turns(seconds, 100, 1000)
        assert len(short.read_task(task, Plan(turns, seconds)).frames) == turns == math.ceil(2.95 / seconds)


@pytest.mark.parametrize("name", ["sound.mkv", "sound.webm", "cut_last.mp4", "late.mp4", "no_length.mp4"])
def test_watch_takes_the_same_length_and_reads_all_of_it(name, film, reader, capsys):
    from evals.watch.job import _shown

    shown = _shown(composed("job=watch", f"watch.video='{film(name)}'"))
    assert shown.length == shown.end == reader.duration(str(film(name)))
    assert ("appears at 2.00 s: black until then" in capsys.readouterr().err) == (name == "late.mp4")
    chunks = math.ceil(shown.end - 1e-6)
    assert len(reader.read(shown.video, 0.0, shown.end, chunks).frames) == chunks


# ---- a picture that comes late ----


def test_a_late_picture_is_preceded_by_black_and_a_clip_before_it_is_refused(film, reader):
    path = str(film("late.mp4"))
    clip = reader.read(path, 0.0, 4.4, 4)
    assert not clip.frames[:2].any()
    assert all(picture.any() for picture in clip.frames[2:].reshape(-1, SIDE, SIDE, 3))
    # A longer clip has the same frames.
    assert np.array_equal(reader.read(path, 0.0, math.inf, 1).frames, clip.frames[:1])
    for end in (0.5, 2.0):
        with pytest.raises(VideoError) as caught:
            reader.read(path, 0.0, end, 1)
        assert str(caught.value).startswith(
            f"{path}: the clip ends at {end:g} s but the first picture of the file appears at 2.00 s"
        )
        assert "make_zero" in str(caught.value)


def test_the_advice_for_a_late_picture_moves_the_clock(film, reader, tmp_path):
    moved = copied(film("late.mp4"), tmp_path / "moved.mkv", muxer={"avoid_negative_ts": "make_zero"})
    # What is left are the B-frames.
    assert reader.presentation(str(moved)).first <= 0.2


def test_the_checker_tells_of_late_pictures_and_not_of_b_frames(film, tmp_path, capsys):
    names = ["late.mp4", "nothing_first.mp4", "bframes.flv", "plain.mp4"]
    path = rows(tmp_path / "rows.jsonl", *(row(name, film(name)) for name in names))
    assert main([str(path), *ANYWHERE]) == 0
    said = capsys.readouterr().out
    assert (
        f"2 videos whose picture starts later than 0 s (the latest at 2.00 s: {film('late.mp4')}): black until then"
        in said
    )
    path = rows(tmp_path / "rows.jsonl", *(row(name, film(name)) for name in names[2:]))
    assert main([str(path), *ANYWHERE]) == 0
    assert "later than 0 s" not in capsys.readouterr().out


def test_watch_refuses_to_end_before_the_first_picture(film):
    from evals.watch.job import _shown

    with pytest.raises(ValueError, match=r"watch\.seconds=1 ends before the first picture of .*late\.mp4.* at 2\.00 s"):
        _shown(composed("job=watch", f"watch.video='{film('late.mp4')}'", "watch.seconds=1"))


# ---- films that cannot be shown ----


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda to, film: with_edits(film("bframes.mp4"), to, [(0.5, 1.0), (0.7, 0.2)]), "not decoded in the order"),
        (
            lambda to, film: with_edits(film("keys.mp4"), to, [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)]),
            "not decoded in the order",
        ),
        (lambda to, film: with_edits(film("bframes.mp4"), to, [(0.0, 90.0)]), "edit list hides every picture"),
        (lambda to, film: to.write_bytes(film("plain.mp4").read_bytes()[:-600]), "truncated or damaged"),
    ],
)
def test_a_film_without_a_clock_is_refused_by_name(make, said, film, reader, tmp_path):
    make(tmp_path / "odd.mp4", film)
    for ask in (
        lambda: reader.read(str(tmp_path / "odd.mp4"), 0.0, math.inf, 2),
        lambda: reader.duration(str(tmp_path / "odd.mp4")),
    ):
        with pytest.raises(VideoError, match=said) as caught:
            ask()
        assert caught.value.video == str(tmp_path / "odd.mp4")


def test_a_truncated_film_is_as_long_as_what_can_be_decoded(film, reader, tmp_path):
    """The index stands in front and promises all of it; the file ends within a packet."""
    whole = write_film(tmp_path / "whole.mp4", options=SHORT, muxer={"movflags": "faststart"}).read_bytes()
    (tmp_path / "part.mp4").write_bytes(whole[: len(whole) * 3 // 5])
    length = reader.duration(str(tmp_path / "part.mp4"))
    assert 0.5 < length < 2.0
    clip = reader.read(str(tmp_path / "part.mp4"), 0.0, math.inf, 100, chunk_seconds=0.1)
    assert len(clip.frames) == math.ceil(length / 0.1 - 1e-6)
    frames = decoded(film("short.mp4"))
    for time, picture in zip(clip.frame_times.ravel(), clip.frames.reshape(-1, SIDE, SIDE, 3), strict=True):
        assert np.array_equal(picture, shown_at(frames, time))
    with pytest.raises(VideoError, match=rf"lasts until .* s but the file holds {length:.2f} s"):
        reader.read(str(tmp_path / "part.mp4"), 0.0, length + 0.7, 2)


@pytest.mark.parametrize(
    ("matrix", "as_shown"),
    [
        ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
        ((1, 0, 0, -1), lambda picture: picture[::-1]),
        ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
        ((-2, 0, 0, -2), lambda picture: picture[::-1, ::-1]),
    ],
)
def test_mirrored_films_are_not_turned_upside_down(matrix, as_shown, film, reader, tmp_path):
    path = with_matrix(film("wide.mp4"), tmp_path / "mirrored.mp4", *matrix)
    clip = reader.read(str(path), 0.0, math.inf, 1)
    wanted = as_shown(shown_at(decoded(film("wide.mp4")), clip.frame_times[0, 0]))
    assert np.array_equal(clip.frames[0, 0], wanted)


def test_titles_and_names_do_not_matter(film, reader, tmp_path):
    """A title in Latin-1, a name that looks like a protocol or a pattern."""
    titled = write_film(tmp_path / "titled.mkv", title="cafX!").read_bytes()
    (tmp_path / "a:%03d?.mkv").write_bytes(titled.replace(b"cafX!", b"caf\xe9!"))
    assert reader.duration(str(tmp_path / "a:%03d?.mkv")) == reader.duration(str(film("plain.mkv")))


def test_a_film_whose_frames_change_size_is_refused(film, reader, tmp_path):
    """Another size from the second film on: its key frame brings its own parameters."""
    other = write_film(tmp_path / "other.mp4", options=SHORT, size=(96, 128))
    joined(film("short.mp4"), other, tmp_path / "joined.mp4")
    assert len(reader.read(str(tmp_path / "joined.mp4"), 0.0, 2.0, 2).frames) == 2
    with pytest.raises(VideoError, match="its frames change size on the way"):
        reader.read(str(tmp_path / "joined.mp4"), 0.0, 4.0, 4)


def test_a_film_that_only_has_a_cover_holds_no_video(reader, tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        packets = cover(container) + silence(sound, 1.0)
        for packet in packets:
            container.mux(packet)
    with pytest.raises(VideoError, match="it holds no video but a cover picture"):
        reader.duration(str(tmp_path / "song.mp4"))
