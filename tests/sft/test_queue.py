"""Demonstrations ahead of the learner: order, replacement of refused ones, and an end where none can be laid out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.training_stage import TrainingStage
from sft.queue import DemonstrationQueue
from streams.messages import GroupSummary, ScriptTask
from streams.task import Plan
from tests.support.configs import composed
from tests.support.stage import stage_context
from tests.support.tasks import clip_task

BASE = composed()


class Workers:
    """Take scripts; `answer` replies to one of those that wait, in any order."""

    def __init__(self, count: int, refused: set[int]) -> None:
        self.refused = refused
        self.sent: list[tuple[int, ScriptTask]] = []
        self.waiting: dict[int, object] = {}
        self.workers = [
            SimpleNamespace(script=SimpleNamespace(options=lambda num_returns, w=w: self._remote(w)))
            for w in range(count)
        ]

    def _remote(self, worker):
        def remote(script):
            self.sent.append((worker, script))
            return len(self.sent) - 1, f"log of {script.group}"

        return SimpleNamespace(remote=remote)

    def expect(self, reference, what, handle):
        self.waiting[reference] = handle

    def answer(self, number: int) -> None:
        worker, script = self.sent[number]
        failed = "no room" if number in self.refused else None
        self.waiting.pop(number)(GroupSummary(script.group, script.task.id, worker, log_tokens=number, failed=failed))


def queue(folder, workers: Workers, ahead: int, patience: int):
    context, told = stage_context(replace(BASE, run_root=str(folder)), "sft", steps=10)
    stage = TrainingStage(context, (), patience=patience)
    stage.events = workers
    context.session.crew.places.workers = workers.workers
    scripts = (ScriptTask(f"0/{n}", clip_task(str(n)), Plan(1, 1.0), ()) for n in range(10_000))
    hopeless = "no demonstration could be laid out"
    made = DemonstrationQueue(
        stage, scripts, ahead, lambda script, why: stage.drop(script.group, f"skipped {script.group}: {why}", hopeless)
    )
    return made, stage, told


@given(st.integers(1, 3), st.integers(1, 4), st.sets(st.integers(0, 40), max_size=15), st.data())
@settings(max_examples=100, deadline=None)
def test_in_any_order_of_replies_samples_are_taken_as_they_were_sent_without_the_refused(
    tmp_path_factory, count, batch, refused, data
):
    workers = Workers(count, refused)
    made, stage, told = queue(tmp_path_factory.mktemp("run"), workers, 2 * batch, patience=100)
    good = (n for n in range(10_000) if n not in refused)
    for _ in range(6):
        while True:
            made.fill()
            taken = made.take(batch)
            assert len(workers.waiting) <= 2 * batch, "no more are under way than are asked for ahead"
            if taken is not None:
                break
            workers.answer(data.draw(st.sampled_from(sorted(workers.waiting))))
        expected = [next(good) for _ in range(batch)]
        assert [sample.group for sample in taken] == [f"0/{n}" for n in expected]
        assert [sample.payload for sample in taken] == [f"log of 0/{n}" for n in expected]
        # What is refused is named once it would have been taken, not earlier: a checkpoint depends on no timing.
        assert list(stage.dropped) == [f"0/{n}" for n in sorted(refused) if n < expected[-1]]
    assert told.said == [f"sft: skipped {group}: no room" for group in stage.dropped]
    assert [worker for worker, _ in workers.sent] == [n % count for n in range(len(workers.sent))]


def test_where_none_can_be_laid_out_the_stage_ends(tmp_path):
    workers = Workers(1, set(range(100)))
    made, stage, _ = queue(tmp_path, workers, 2, patience=3)

    def take_all():
        for number in range(100):
            made.fill()
            workers.answer(number)
            assert made.take(1) is None

    with pytest.raises(RuntimeError, match="no demonstration could be laid out"):
        take_all()
    assert list(stage.dropped) == ["0/0", "0/1", "0/2", "0/3"]


def test_one_that_can_be_laid_out_starts_the_count_of_refusals_again(tmp_path):
    workers = Workers(1, {n for n in range(100) if n % 4})
    made, stage, _ = queue(tmp_path, workers, 1, patience=3)
    taken = []
    made.fill()
    for number in range(80):
        workers.answer(number)
        taken += made.take(1) or []
    assert len(taken) == 20
    assert len(stage.dropped) >= 57
