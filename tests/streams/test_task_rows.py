"""Rows that are kept on disk are the tasks that were added, and take no memory however many they are."""

import pickle
import tempfile
import threading
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.data import rows as module
from streams.data.rows import TaskRows
from streams.task import ExpectedAnswer, StreamTask, TimedQuery, VideoFile

pytestmark = pytest.mark.smoke

TIMES = st.floats(0, 100, allow_nan=False)
TASKS = st.lists(
    st.builds(
        lambda name, text, time, size: StreamTask(
            name,
            f"/v/{name}.mp4",
            0.0,
            101.0,
            (TimedQuery(time, text),),
            (ExpectedAnswer(time, text),),
            origin=f"rows.jsonl:{size}",
            file=VideoFile("/v", size),
        ),
        st.text("aé中/", min_size=1, max_size=20),
        st.text("xyzé", min_size=1, max_size=200),
        TIMES,
        st.none() | st.integers(0, 2**40),
    ),
    max_size=30,
)


@pytest.fixture(params=[0, 2**30], ids=["on disk", "in memory"])
def kept(request, monkeypatch):
    # 0 would be no limit.
    monkeypatch.setattr(module, "MEMORY_BYTES", request.param or 1)


@given(tasks=TASKS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_rows_are_the_tasks_that_were_added(tasks, data):
    rows = TaskRows.of(tasks)
    assert isinstance(rows, Sequence)
    assert len(rows) == len(tasks)
    assert list(rows) == tasks
    assert rows == tuple(tasks)
    assert [(row.origin, row.file) for row in rows] == [(task.origin, task.file) for task in tasks]
    cut = slice(*data.draw(st.tuples(*[st.none() | st.integers(-40, 40)] * 2, st.sampled_from([None, 1, 2, -1, -3]))))
    assert list(rows[cut]) == tasks[cut]
    some_rows = [i for i, task in enumerate(tasks) if len(task.id) > 3]
    assert list(rows.select(some_rows)) == [tasks[i] for i in some_rows]
    for index in range(-len(tasks), len(tasks)):
        assert rows[index] == tasks[index]
    for index in (len(tasks), -len(tasks) - 1):
        with pytest.raises(IndexError):
            rows[index]


def some(count, text="x"):
    return (
        StreamTask(str(i), "/v/a.mp4", 0.0, 9.0, (TimedQuery(1.0, text),), (ExpectedAnswer(2.0, text),))
        for i in range(count)
    )


def test_a_row_takes_no_memory_however_long_it_is(kept, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 2**16)
    tracemalloc.start()
    try:
        rows = TaskRows.of(some(4000, "x" * 1000))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**20, "4 MB of text"
    assert held < 2**19
    assert sum(len(row.queries[0].text) for row in rows) == 4_000_000


def test_rows_are_read_by_several_threads_at_once(kept):
    rows = TaskRows.of(some(300))
    found = [[] for _ in range(4)]

    def read(into, step):
        into += [rows[(i * step) % 300].id for i in range(300)]

    threads = [
        threading.Thread(target=read, args=(into, step)) for into, step in zip(found, (1, 7, 11, 13), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for into, step in zip(found, (1, 7, 11, 13), strict=True):
        assert into == [str((i * step) % 300) for i in range(300)]


def test_a_full_disk_is_said_with_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 2**10)
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(OSError, match=r"temporary file, which cannot be written .*TMPDIR"):
        TaskRows.of(some(50))
    assert len(TaskRows.of(some(1))) == 1, "few rows need no file"


def test_rows_are_sent_to_no_other_process():
    """Whoever sends some sends the tasks."""
    with pytest.raises(TypeError):
        pickle.dumps(TaskRows.of(some(1)))
