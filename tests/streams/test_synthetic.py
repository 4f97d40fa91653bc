import collections
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.data.dataset import load_tasks
from streams.data.synthetic import questions as synthetic
from streams.data.synthetic.questions import MODES, SyntheticConfig, generate, make_task, plan
from streams.data.synthetic.scenes import COLOURS, Scene, Shown, draw, write_clip
from streams.video.config import VideoConfig
from streams.video.reader import ClipReader

SMALL = SyntheticConfig(train_clips=12, heldout_per_mode=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "quickstart", SMALL)


def both_splits(config):
    for split in ("train", "heldout"):
        for index, (mode, colour) in enumerate(plan(config, split)):
            yield mode, colour, *make_task(config, split, index, mode, colour)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_clips", 0),
        ("heldout_per_mode", 0),
        ("window", 0),
        ("seed", -1),
        ("chunk_seconds", 0),
        ("min_turns", 0),
        ("min_turns", 16),
        ("max_turns", 9),
        ("chunk_seconds", float("nan")),
    ],
)
def test_config_names_its_key(field, value):
    with pytest.raises(ValueError, match=rf"data\.synthetic\.{field}={value}"):
        SyntheticConfig(**{field: value})


def check_clip(config, mode, colour, task, scene):
    """The generator's contract for one clip."""
    seconds = config.chunk_seconds
    (query,), (answer,) = task.queries, task.answers
    asked, due = task.chunk_of(query.time, seconds), task.chunk_of(answer.time, seconds)
    assert (task.category, answer.text, answer.query) == (mode, colour, 0)
    assert config.min_turns <= scene.chunks <= config.max_turns
    assert task.end == pytest.approx(scene.chunks * seconds)
    assert scene.chunks >= due + 6
    assert config.min_turns <= task.num_turns(seconds, 5, config.max_turns) == due + 6
    seen = [scene.visible(chunk) for chunk in range(scene.chunks)]
    for first, second in zip(scene.shown, scene.shown[1:], strict=False):
        assert first.stop < second.first
    assert all(0 <= shape.first < shape.stop <= scene.chunks for shape in scene.shown)
    said = [thought.text for thought in task.thoughts]
    assert said == ["nothing" if shape is None else shape.colour for shape in seen]
    assert [task.chunk_of(thought.time, seconds) for thought in task.thoughts] == list(range(scene.chunks))
    if mode == "recall":
        assert asked == due
        last = scene.shown[-1]
        assert last.colour == colour
        # Neither picture nor note of any shape lies in the last `window` turns or in this one.
        assert asked - (last.stop - 1) >= config.window + 1
        assert all(shape is None for shape in seen[asked - config.window :])
        return
    target = seen[due]
    assert target is scene.shown[-1]
    assert target.colour == colour
    assert target.stop >= min(due + 5, scene.chunks)
    if mode == "now":
        assert asked == due
    else:
        assert 2 <= due - asked <= 6
        assert asked <= 3
        assert all(shape is None for shape in seen[asked:due])


def test_every_clip_keeps_the_contract():
    config = SyntheticConfig()
    second = collections.Counter()
    for mode, colour, task, scene in both_splits(config):
        check_clip(config, mode, colour, task, scene)
        second[mode] += len(scene.shown) == 2
    assert all(0.3 < second[mode] / (80 + 96) < 0.7 for mode in MODES), second


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 15),
    st.integers(0, 6),
    st.sampled_from([0.5, 1.0, 2.0, 0.3]),
    st.integers(0, 99),
)
def test_other_windows_and_lengths(window, low, more, seconds, seed):
    high = max(low, window + 8, 11) + more
    config = SyntheticConfig(9, 3, window=window, seed=seed, chunk_seconds=seconds, min_turns=low, max_turns=high)
    for mode, colour, task, scene in both_splits(config):
        check_clip(config, mode, colour, task, scene)


def test_balance_and_independence():
    config = SyntheticConfig()
    assert len(plan(config, "train")) == 240
    assert len(plan(config, "heldout")) == 288
    for split in ("train", "heldout"):
        dealt = collections.Counter(plan(config, split))
        assert set(dealt) == {(mode, colour) for mode in MODES for colour in COLOURS}
        for mode in MODES:
            assert len({dealt[mode, colour] for colour in COLOURS}) == 1, "a mode's answers are dealt out evenly"
    # The other shape of a clip has the answer's colour as often as chance has it.
    large = SyntheticConfig(train_clips=3000, heldout_per_mode=1)
    same = [
        len({shape.colour for shape in scene.shown}) == 1
        for _, _, _, scene in both_splits(large)
        if len(scene.shown) == 2
    ]
    assert len(same) > 1000
    assert abs(np.mean(same) - 0.25) < 0.05


def test_the_seed_decides_everything():
    first = [(task, scene) for _, _, task, scene in both_splits(SMALL)]
    assert first == [(task, scene) for _, _, task, scene in both_splits(SMALL)]
    other = SyntheticConfig(train_clips=12, heldout_per_mode=4, seed=1)
    assert first != [(task, scene) for _, _, task, scene in both_splits(other)]
    scenes = [scene for _, scene in first]
    assert len(set(scenes)) == len(scenes)


def test_files_can_be_read_and_show_what_the_tasks_say(data):
    train, heldout = (
        load_tasks(data.train_jsonl, on_bad="raise"),
        load_tasks(data.heldout_jsonl, on_bad="raise"),
    )
    assert (
        (len(train.tasks), len(heldout.tasks)) == (SMALL.train_clips, SMALL.heldout_per_mode * len(MODES)) == (12, 12)
    )
    assert data.fresh
    checked = 0
    with ClipReader(VideoConfig()) as reader:
        for task in (*train.tasks, *heldout.tasks):
            clip = reader.read(task.video, task.start, task.end, task.num_turns(1.0, 5, 20))
            vivid = np.ptp(clip.frames.astype(int), axis=4)
            for chunk, thought in enumerate(task.thoughts[: len(vivid)]):
                if thought.text == "nothing":
                    assert vivid[chunk].mean() < 6
                    assert 110 < clip.frames[chunk].mean() < 146
                else:
                    inside = clip.frames[chunk][vivid[chunk] > 0.8 * vivid[chunk].max()]
                    assert 0.05 < len(inside) / vivid[chunk].size < 0.5
                    away = {name: np.abs(inside.mean(axis=0) - rgb).max() for name, rgb in COLOURS.items()}
                    assert min(away, key=away.__getitem__) == thought.text
                    assert away[thought.text] < 25
                    # Both frames of the chunk show it: shapes come and go at chunk boundaries.
                    assert np.abs(clip.frames[chunk, 0].astype(int) - clip.frames[chunk, 1]).mean() < 6
                    checked += 1
    assert checked > 50


def test_a_second_call_finds_it_and_repairs_it(data):
    before = data.train_jsonl.read_bytes()
    stamp = (data.root / "train/0000.mp4").stat().st_mtime_ns
    pixels = (data.root / "train/0000.mp4").read_bytes()
    assert not generate(data.root, SMALL).fresh
    assert (data.root / "train/0000.mp4").stat().st_mtime_ns == stamp
    (data.root / "train/0000.mp4").write_bytes(b"")
    assert generate(data.root, SMALL).fresh
    assert data.train_jsonl.read_bytes() == before
    assert (data.root / "train/0000.mp4").read_bytes() == pixels
    manifest = json.loads((data.root / "manifest.json").read_text())
    assert manifest["clips"] == 24
    assert manifest["config"]["window"] == 4
    assert [entry.name for entry in data.root.parent.iterdir()] == [data.root.name]


def test_another_config_replaces_it_and_other_folders_are_safe(tmp_path):
    tiny = SyntheticConfig(train_clips=3, heldout_per_mode=1)
    (tmp_path / "d").mkdir()
    assert generate(tmp_path / "d", tiny).fresh
    assert generate(tmp_path / "d", SyntheticConfig(train_clips=4, heldout_per_mode=1)).fresh
    assert len(list((tmp_path / "d/train").iterdir())) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work.txt").write_text("precious")
    with pytest.raises(ValueError, match="was not made by this generator"):
        generate(tmp_path / "mine", tiny)
    assert (tmp_path / "mine/work.txt").read_text() == "precious"
    with pytest.raises(OSError, match=r"cannot write the synthetic data to .*choose another folder"):
        generate(tmp_path / "mine/work.txt/below", tiny)


def test_a_failure_leaves_the_old_data(tmp_path, monkeypatch):
    tiny = SyntheticConfig(train_clips=3, heldout_per_mode=1)
    generate(tmp_path / "d", tiny)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write_clip", full)
    with pytest.raises(OSError, match=r"d: No space left on device \(free some space") as caught:
        generate(tmp_path / "d", SyntheticConfig(train_clips=5, heldout_per_mode=1))
    assert caught.value.errno == 28
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
    assert not generate(tmp_path / "d", tiny).fresh


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_an_error(tmp_path):
    """A real write failure inside the muxer (here the process's file size limit) is not lost."""
    script = (
        "import resource, sys\n"
        "from streams.data.synthetic.questions import SyntheticConfig, generate\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))\n"
        "generate(sys.argv[1], SyntheticConfig(train_clips=3, heldout_per_mode=1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "d")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "cannot write the synthetic data" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_shapes_cover_half_to_seven_tenths_of_the_short_side():
    for shape in ("square", "circle", "triangle"):
        shown = Shown(1, 2, "red", shape, 0.6, 0.05, -0.05)
        frames = draw(Scene(3, 1.0, 2, 72, 96, (shown,)), np.random.default_rng(0))
        assert frames.shape == (6, 72, 96, 3)
        red = (frames == COLOURS["red"]).all(axis=-1)
        assert [bool(frame.any()) for frame in red] == [False, False, True, True, False, False]
        rows, columns = np.nonzero(red[2])
        assert 0.5 * 72 <= np.ptp(rows) + 1 <= 0.7 * 72
        assert 0.5 * 72 <= np.ptp(columns) + 1 <= 0.7 * 72


def test_writer_rejects_what_h264_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"15x16 pixels"):
        write_clip(tmp_path / "a.mp4", np.zeros((1, 16, 15, 3), np.uint8), 4)
    with pytest.raises(ValueError, match=r"uint8 \[n, h, w, 3\]"):
        write_clip(tmp_path / "a.mp4", np.zeros((0, 16, 16, 3), np.uint8), 4)
