import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

from streams.video.config import VideoConfig
from streams.video.decode import ClipRequest, causal_limits, resize_frame
from streams.video.patches import normalize_patches, patchify
from streams.video.presentation import DecodeError, check_container
from streams.video.reader import ClipReader, VideoError, frame_times, smart_resize
from tests.support.clips import frame_number, grey_ramp, solid, write_clip, write_endless, write_grey_ramp
from tests.support.project import ROOT


@pytest.fixture(scope="module")
def reader():
    with ClipReader(VideoConfig()) as shared:
        yield shared


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_seconds", 0),
        ("decode_timeout_s", float("nan")),
        ("frames_per_chunk", 3),
        ("frames_per_chunk", 0),
        ("min_pixels", 0),
        ("max_pixels", 10),
    ],
)
def test_config_names_its_key(field, value):
    with pytest.raises(ValueError, match=rf"data\.video\.{field}={value}"):
        VideoConfig(**{field: value})


# ---- frame grid ----


@given(st.floats(0, 1e4), st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 10), st.sampled_from([2, 4, 8]))
def test_a_longer_clip_has_the_same_earlier_times(start, chunks, more, seconds, per_chunk):
    short = frame_times(start, chunks, seconds, per_chunk)
    long = frame_times(start, chunks + more, seconds, per_chunk)
    assert np.array_equal(short, long[:chunks])
    for chunk in range(chunks):
        begin = start + chunk * seconds
        assert (short[chunk] > begin - 1e-9).all()
        assert (short[chunk] < begin + seconds + 1e-9).all()
    assert (np.diff(short.ravel()) > 0).all()


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=50), st.integers(1, 20), st.floats(0.1, 3))
def test_no_frame_is_later_than_its_time(gaps, chunks, seconds):
    stamps = np.concatenate([[0.0], np.cumsum(gaps)])
    end = chunks * seconds
    times = frame_times(0.0, chunks, seconds, 2)
    found = np.searchsorted(stamps, causal_limits(times, end), side="right") - 1
    assert (stamps[found] <= times + 1e-3).all()
    assert (stamps[found] < end).all()
    # The next frame, if there is one in the segment, comes too late.
    after = np.append(stamps, np.inf)[found + 1]
    assert ((after > times) | (after >= end - 1e-3)).all()


def test_frames_of_a_real_clip(tmp_path, reader):
    path = str(write_grey_ramp(tmp_path / "a.mp4", 40, 8))
    clip = reader.read(path, 0.0, 5.0, 5)
    assert clip.frames.shape == (5, 2, 56, 56, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.grid_thw == (1, 4, 4)
    assert clip.nbytes == clip.frames.nbytes + 80
    assert clip.frame_times[1].tolist() == [1.25, 1.75]
    numbers = [[frame_number(frame) for frame in chunk] for chunk in clip.frames]
    np.testing.assert_allclose(numbers, [[8 * c + 2, 8 * c + 6] for c in range(5)], atol=0.6)
    short = reader.read(path, 0.0, 3.0, 3)
    assert np.array_equal(short.frames, clip.frames[:3])
    late = reader.read(path, 2.0, 5.0, 2)
    assert np.array_equal(late.frames, clip.frames[2:4])
    # The segment ends after 4.5 s: what comes later in the file is not shown, the last frame stays.
    part = reader.read(path, 0.0, 4.5, 5)
    assert np.array_equal(part.frames[:4], clip.frames[:4])
    assert frame_number(part.frames[4, 1]) == pytest.approx(35, abs=0.6)


@pytest.mark.parametrize(
    ("chunks", "start", "end"), [(0, 0, 1), (6, 0, 5), (1, 5, 5), (1, -1, 5), (1, 0, float("nan"))]
)
def test_arguments_of_read(reader, chunks, start, end):
    with pytest.raises(ValueError, match=r"x\.mp4"):
        reader.read("x.mp4", start, end, chunks)


OPEN_GOP = {"preset": "medium", "x264-params": "open-gop=1:bframes=3:keyint=30:min-keyint=30:scenecut=0"}


def write_encoded(path, frames, times, encoder, options=None):
    """With a real encoder's B-frames and key frames; times are those of the frames, in tenths of a second."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = encoder
        for image, at in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("case", ["open.mkv", "open.mp4", "fragmented.mp4", "b.flv"])
def test_frames_are_exact_where_seeking_is_not(tmp_path, reader, case):
    """Seeking lands on other frames in these files, up to 3 s late, and reports nothing."""
    encoder = OPEN_GOP if case.startswith("open") else {"preset": "medium", "g": "30"}
    options = {"movflags": "frag_keyframe+empty_moov"} if case.startswith("frag") else {}
    path = write_encoded(tmp_path / case, grey_ramp(120), range(120), encoder, options)
    # Without an edit list B-frames put off the first picture: FLV and fragmented MP4 start at 0.2 s.
    late = 0.2 if case in ("fragmented.mp4", "b.flv") else 0.0
    assert reader.presentation(path).first == pytest.approx(late, abs=1e-3)
    for start in (0.0, 5.0, 6.5):
        clip = reader.read(path, start, 12.0, int(12 - start))
        expected = np.floor((clip.frame_times - late) * 10 + 1e-6)
        found = [[frame_number(frame) for frame in chunk] for chunk in clip.frames]
        np.testing.assert_allclose(found, expected, atol=0.6)


def test_variable_frame_rate(tmp_path, reader):
    """30 frames in 3 s, a pause of 2 s on frame 29, then 30 frames in 3 s."""
    times = [*range(30), *range(50, 80)]
    path = write_encoded(tmp_path / "vfr.mp4", grey_ramp(60), times, {"preset": "medium"})
    clip = reader.read(path, 0.0, 8.0, 8)
    expected = [[max(i for i, at in enumerate(times) if at / 10 <= t) for t in row] for row in clip.frame_times]
    assert expected[3:5] == [[29, 29], [29, 29]]
    np.testing.assert_allclose([[frame_number(f) for f in row] for row in clip.frames], expected, atol=0.6)


# ---- shapes and colours ----


@pytest.mark.parametrize("width", [16, 24, 32, 48, 72, 96, 144])
def test_colours_at_awkward_widths(tmp_path, width):
    frames = solid((200, 40, 60), 8, 48, width)
    frames[:, :, width // 2 :] = (40, 60, 200)
    path = tmp_path / "w.mp4"
    write_clip(path, frames, 4)
    with ClipReader(VideoConfig(min_pixels=1, max_pixels=10**6), patch_size=2, merge_size=2) as exact:
        clip = exact.read(str(path), 0, 2, 2)
    assert clip.frames.shape == (2, 2, 48, width, 3)
    left, right = clip.frames[..., : width // 2 - 2, :], clip.frames[..., width // 2 + 2 :, :]
    assert np.abs(left.astype(int) - [200, 40, 60]).max() < 14
    assert np.abs(right.astype(int) - [40, 60, 200]).max() < 14


# ---- resizing and patches ----

SIDES = st.integers(1, 3000)


@settings(max_examples=200)
@given(SIDES, SIDES, st.sampled_from([28, 32]), st.integers(1, 500), st.integers(1, 40))
def test_smart_resize_keeps_to_the_budget(height, width, factor, low, times):
    low *= factor * factor // 4
    high = low * times
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor, low, high)
        return
    rows, columns = smart_resize(height, width, factor, low, high)
    assert (rows, columns) == qwen.smart_resize(height, width, factor, low, high)
    assert rows % factor == columns % factor == 0
    assert min(rows, columns) >= 0
    rounded = round(height / factor) * round(width / factor) * factor * factor
    if rounded > high:
        # A side of one token cannot shrink further.
        assert rows * columns <= high or min(rows, columns) == factor
    elif rounded < low:
        assert rows * columns >= low
    else:
        assert rows * columns == rounded


SHAPES = [(56, 56), (48, 64), (100, 90), (28, 28), (20, 300), (480, 640), (13, 17), (1, 150), (144, 96)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SHAPES]


@pytest.mark.parametrize("budget", [(28 * 28, 56 * 56), (56 * 56, 112 * 112), (4 * 28 * 28, 8 * 28 * 28)])
def test_same_pixels_as_the_image_processor(images, budget):
    low, high = budget
    processor = qwen.Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    request = ClipRequest("x", 0, 1, 1, 1, 1, 2, low, high, 28, 1)
    for image in images:
        theirs = processor(images=[Image.fromarray(image)], return_tensors="pt")
        ours = resize_frame(image, request)
        grid = theirs["image_grid_thw"][0].tolist()
        assert [1, ours.shape[0] // 14, ours.shape[1] // 14] == grid
        patches = patchify(np.stack([ours, ours]))
        assert patches.dtype == np.uint8
        found = normalize_patches(torch.from_numpy(patches), processor.image_mean, processor.image_std)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, theirs["pixel_values"], atol=1e-6, rtol=0)


def test_each_temporal_half_is_its_own_image(images):
    processor = qwen.Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 112 * 112})
    request = ClipRequest("x", 0, 1, 1, 1, 1, 2, 784, 112 * 112, 28, 1)
    image = images[5]
    pair = [image, 255 - image, image[::-1].copy(), image[:, ::-1].copy()]
    patches = patchify(np.stack([resize_frame(frame, request) for frame in pair]))
    found = normalize_patches(torch.from_numpy(patches), processor.image_mean, processor.image_std)
    halves = found.reshape(2, -1, 3, 2, 14 * 14)
    for i, frame in enumerate(pair):
        theirs = processor(images=[Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
        expected = theirs.reshape(-1, 3, 2, 14 * 14)[:, :, 0]
        torch.testing.assert_close(halves[i // 2, :, :, i % 2], expected, atol=1e-6, rtol=0)


def test_patch_arguments():
    with pytest.raises(ValueError, match=r"\[3, 28, 28, 3\]"):
        patchify(np.zeros((3, 28, 28, 3), np.uint8))
    with pytest.raises(ValueError, match=r"float32"):
        patchify(np.zeros((2, 28, 28, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        normalize_patches(torch.zeros(1, 6), (0, 0, 0), (1, 1, 1))


# ---- files that cannot be used ----


def noise_file(tmp_path, options):
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "noise.mp4"
    write_clip(path, frames, 10, options)
    return path.read_bytes()


def reason_for(reader, path, end=6.0, chunks=6):
    with pytest.raises(VideoError) as caught:
        reader.read(str(path), 0.0, end, chunks)
    assert caught.value.video == str(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_files_that_are_no_videos(tmp_path, reader):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello world " * 50)
    (tmp_path / "old.avi").write_bytes(b"RIFF....AVI LIST" * 50)
    (tmp_path / "fake.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    assert "No such file" in reason_for(reader, tmp_path / "gone.mp4")
    assert "is a folder" in reason_for(reader, tmp_path)
    assert "empty (0 bytes)" in reason_for(reader, tmp_path / "empty.mp4")
    for name in ("text.mp4", "old.avi", "still.png"):
        assert "not a supported video: it does not begin like" in reason_for(reader, tmp_path / name)
    assert "truncated or damaged" in reason_for(reader, tmp_path / "fake.mp4")


def test_truncated_files(tmp_path, reader):
    path = tmp_path / "cut.mp4"
    data = noise_file(tmp_path, {})
    path.write_bytes(data[: len(data) // 2])
    assert "truncated or damaged" in reason_for(reader, path)
    # With the index in front, the header still promises 60 frames; the file holds half of them.
    data = noise_file(tmp_path, {"movflags": "faststart"})
    path.write_bytes(data[: len(data) // 2])
    reason = reason_for(reader, path)
    assert "the row says the clip lasts until 6 s but the file holds " in reason
    held = float(reason.split("holds ")[1].split()[0])
    assert 2 < held < 4
    start = data.index(b"mdat")
    for kept, fill in ((start + 4, b""), (start + 200, b""), (len(data) // 2, bytes(len(data) // 2))):
        path.write_bytes(data[:kept] + fill)
        assert "truncated or damaged" in reason_for(reader, path)


def test_a_row_longer_than_its_file(tmp_path, reader):
    path = write_grey_ramp(tmp_path / "a.mp4", 40, 8)
    reason = reason_for(reader, path, end=5.7, chunks=5)
    assert reason == "the row says the clip lasts until 5.7 s but the file holds 5.00 s (40 frames)"
    assert frame_number(reader.read(str(path), 0, 5.6, 6).frames[5, 1]) == pytest.approx(39, abs=0.6)


def test_aspect_ratio(reader, tmp_path):
    write_clip(tmp_path / "thin.mp4", solid((9, 9, 9), 8, 2, 640), 4)
    assert "aspect ratio above 200" in reason_for(reader, tmp_path / "thin.mp4", 2.0, 2)


def test_container_check_lists_what_to_do(tmp_path):
    (tmp_path / "a.ts").write_bytes(b"G" * 400)
    with pytest.raises(DecodeError, match=r"ffmpeg -i IN -c copy OUT\.mkv"):
        check_container(str(tmp_path / "a.ts"))


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is odd")))
    assert (error.video, error.reason, str(error)) == ("a.mp4", "is odd", "a.mp4: is odd")


# ---- the child process ----


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stuck_decode_is_ended_and_the_next_read_works(tmp_path):
    write_endless(tmp_path / "stuck.mp4")
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    with ClipReader(VideoConfig(decode_timeout_s=3)) as reader:
        first = reader.read(good, 0, 2, 2)
        pid = reader.child_pid
        began = time.monotonic()
        reason = reason_for(reader, tmp_path / "stuck.mp4")
        assert 2.9 < time.monotonic() - began < 30
        assert "data.video.decode_timeout_s=3 s" in reason
        assert not alive(pid)
        assert np.array_equal(reader.read(good, 0, 2, 2).frames, first.frames)
        assert reader.child_pid != pid


def test_a_child_that_dies(tmp_path):
    write_endless(tmp_path / "stuck.mp4")
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    reader = ClipReader(VideoConfig())
    reader.read(good, 0, 2, 2)
    killer = threading.Timer(0.3, os.kill, (reader.child_pid, signal.SIGKILL))
    killer.start()
    assert "died while reading it (exit code -9)" in reason_for(reader, tmp_path / "stuck.mp4")
    killer.join(timeout=10)
    reader.read(good, 0, 2, 2)
    # Death between two reads is no video's fault: the next read starts another process by itself.
    os.kill(reader.child_pid, signal.SIGKILL)
    time.sleep(0.2)
    reader.read(good, 0, 2, 2)
    pid = reader.child_pid
    reader.close()
    assert reader.child_pid is None
    assert not alive(pid)


PARENT = """
import sys, time
from streams.video.reader import ClipReader, VideoConfig
reader = ClipReader(VideoConfig(decode_timeout_s=1))
reader.read(sys.argv[1], 0, 2, 2)
assert "torch" not in sys.modules and "av" not in sys.modules
print(reader.child_pid, flush=True)
if len(sys.argv) > 2:
    reader.read(sys.argv[2], 0, 2, 2)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_the_child_ends_with_its_parent(tmp_path, stuck):
    """Also from another working directory, and while it is stuck: by the alarm, 5 s after the deadline."""
    good = str(write_grey_ramp(tmp_path / "good.mp4", 8, 4))
    write_endless(tmp_path / "stuck.mp4")
    root = str(ROOT)
    more = [str(tmp_path / "stuck.mp4")] if stuck else []
    script = f"import sys; sys.path.insert(0, {root!r})\n" + PARENT
    parent = subprocess.Popen(
        [sys.executable, "-c", script, good, *more], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3 if stuck else 0)
    parent.kill()
    parent.wait(timeout=10)
    parent.stdout.close()
    give_up = time.monotonic() + 20
    while alive(pid) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not alive(pid)
