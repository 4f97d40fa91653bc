"""What every training stage keeps: groups that are done, steps in journal and charts, checkpoints, the end, dead actors.

Checkpoints are written by Ray's own tasks, and actors are processes that are killed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from rewards.compose import RewardConfig
from rewards.scorer import Scorer
from runtime import checkpointer
from runtime.cluster.events import Events
from runtime.stop import Requeue, StopSignal
from runtime.store.checkpoint import CheckpointState, read_state, verify
from runtime.store.journal import journal_path, read_lines
from runtime.training_stage import TrainingStage
from streams.messages import RewardJob
from streams.task import Plan
from tests.support.configs import composed
from tests.support.rewards import one_answer, stream
from tests.support.stage import named, stage_context

BASE = composed("checkpoint.every=2", "checkpoint.keep=2")


def made(folder, *, resume=None, session=(), **values):
    config = replace(BASE, run_root=str(folder))
    context, told = stage_context(config, "rl", steps=6, resume=resume, **dict(session))
    return TrainingStage(context, (), patience=2, **values), told


def test_a_stage_goes_on_from_where_its_checkpoint_stood(tmp_path):
    state = CheckpointState("rl", 4, 4, named("0/a", "0/b"), named("0/c"), counters={"seconds": 100.0})
    stage, _ = made(tmp_path, resume=state)
    assert (stage.began_at, stage.checkpoints.written) == (4, {4})
    assert (list(stage.consumed), list(stage.dropped), len(stage.done)) == (["0/a", "0/b"], ["0/c"], 3)
    assert "0/c" in stage.done
    assert "0/d" not in stage.done
    assert 100 <= stage.seconds < 160


def test_groups_dropped_in_a_row_end_the_stage_and_a_good_one_in_between_does_not(tmp_path):
    stage, told = made(tmp_path)
    for number in range(2):
        stage.drop(f"0/{number}", f"dropped 0/{number}: bad", "nothing is learned")
    stage.found_good()
    for number in range(2, 4):
        stage.drop(f"0/{number}", f"dropped 0/{number}: bad", "nothing is learned")
    with pytest.raises(RuntimeError, match="nothing is learned"):
        stage.drop("0/4", "dropped 0/4: bad", "nothing is learned")
    assert told.said == [f"rl: dropped {group}: bad" for group in stage.dropped]
    assert list(stage.dropped) == [f"0/{number}" for number in range(5)]


@pytest.mark.parametrize("step", [0, 4])
def test_a_stop_where_there_is_nothing_new_to_save_writes_nothing(tmp_path, step):
    stage, _ = made(tmp_path, resume=CheckpointState("rl", 4, 4) if step else None)
    with pytest.raises(Requeue, match=f"rl: stopped at step {step}, checkpoint none"):
        stage.leave(step, {})
    assert list((tmp_path / "checkpoints" / "rl").iterdir()) == []


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
def _export(path, fails):
    if fails:
        raise OSError(28, "No space left on device")
    os.makedirs(f"{path}/hf")
    with open(f"{path}/hf/model.bin", "w") as file:
        file.write("weights")
    return path


class Learners:
    """Write an export, or run out of disk."""

    fails = False
    actors = ()

    def save(self, path, streaming, *, resumable, limit_s):
        return _export.remote(path, self.fails)


def trained(stage, step):
    stage.trained(step, (f"0/{step}",), {"train/loss": 0.5})


@pytest.mark.slow
def test_a_step_is_charted_once_a_checkpoint_holds_it_and_in_the_journal_before(cluster, tmp_path):
    stage, told = made(tmp_path, session={"learners": Learners()}, group_size=2)
    for step in (1, 2):
        trained(stage, step)
    stage.drop("0/bad", "dropped", "hopeless")
    assert stage.checkpoints.due(2)
    assert not stage.checkpoints.due(3)
    stage.save(2, {"seconds": 1.5})
    trained(stage, 3)  # while it is being written
    assert told.charted == []
    assert [line.step for line in read_lines(journal_path(tmp_path, "rl"))] == [1, 2, 3]
    stage.checkpoints.settle()
    assert told.charted == [1, 2]
    state = read_state(tmp_path / "checkpoints" / "rl" / "step000002")
    assert (state.step, state.version, state.consumed, state.dropped) == (2, 2, named("0/1", "0/2"), named("0/bad"))
    assert (state.group_size, state.counters, state.tracking_run) == (2, {"seconds": 1.5}, "run")
    with pytest.raises(Requeue, match=r"rl: stopped at step 3, checkpoint .*step000003"):
        stage.leave(3, {})
    assert told.charted == [1, 2, 3]
    trained(stage, 4)
    stage.finish(4, {})
    assert told.charted == [1, 2, 3, 4]
    names = {path.name for path in (tmp_path / "checkpoints" / "rl").iterdir()}
    assert names == {"final", "step000003"}, "the older ones are pruned to checkpoint.keep"


@ray.remote(num_cpus=0)
def _never():
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("under_way", ["complete", "stuck"])
def test_without_a_gcs_the_last_checkpoint_needs_no_task_and_waits_for_none_that_never_ends(
    cluster, tmp_path, monkeypatch, under_way
):
    learners = Learners()
    stage, told = made(tmp_path, session={"learners": learners})
    for step in (1, 2):
        trained(stage, step)
    never = None
    if under_way == "stuck":
        never = _never.remote()
        monkeypatch.setattr(learners, "save", lambda *_, **__: never)
    stage.save(2, {})
    monkeypatch.undo()
    trained(stage, 3)
    stage.save(3, {})  # owed: the one before is under way
    stage.context.stop.loss = "Ray's GCS is gone"
    monkeypatch.setattr(checkpointer, "_commit", None)  # a task that nobody could start
    if under_way == "stuck":
        monkeypatch.setattr(checkpointer, "UNDER_WAY_S", 1.0)
    with pytest.raises(Requeue, match=r"rl: stopped at step 3, checkpoint .*step000003"):
        stage.leave(3, {})
    assert verify(tmp_path / "checkpoints" / "rl" / "step000003").state.consumed.names == ("0/1", "0/2", "0/3")
    assert told.charted == [1, 2, 3]
    assert not stage.checkpoints.busy
    assert not stage.checkpoints.holds
    if never is not None:
        ray.cancel(never, force=True)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_costs_itself_and_the_last_one_the_stage(cluster, tmp_path):
    learners = Learners()
    stage, told = made(tmp_path, session={"learners": learners})
    learners.fails = True
    for step in (1, 2):
        trained(stage, step)
    stage.save(2, {})
    stage.checkpoints.settle()
    assert len(told.said) == 1
    assert "rl: the checkpoint of step 2 could not be written: " in told.said[0]
    assert (told.charted, stage.checkpoints.written) == ([], set())
    with pytest.raises(RuntimeError, match=r"the final checkpoint of rl could not be written .*No space left"):
        stage.finish(2, {})
    learners.fails = False
    # A stop tries again: the one of that step is not there.
    with pytest.raises(Requeue, match=r"checkpoint .*step000002"):
        stage.leave(2, {})
    assert json.loads((tmp_path / "checkpoints" / "rl" / "step000002" / "state.json").read_text())["step"] == 2


@ray.remote(num_cpus=0)
def _export_once(path, there):
    deadline = time.monotonic() + 60
    while not os.path.exists(there):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return ray.get(_export.remote(path, False))


class SlowLearners:
    """Write an export once a file is there."""

    actors = ()

    def __init__(self, there) -> None:
        self.there = str(there)

    def save(self, path, streaming, *, resumable, limit_s):
        return _export_once.remote(path, self.there)


@pytest.mark.slow
def test_a_checkpoint_that_is_due_too_early_holds_the_learner_and_is_written_next(cluster, tmp_path):
    stage, told = made(tmp_path, session={"learners": SlowLearners(tmp_path / "go")})
    for step in (1, 2):
        trained(stage, step)
    stage.save(2, {})
    assert not stage.checkpoints.holds
    for step in (3, 4):
        trained(stage, step)
    stage.save(4, {})
    assert stage.checkpoints.holds
    assert "the checkpoint of step 4 is due and that of an earlier step is still being" in told.said[-1]
    assert {path.name for path in stage.checkpoints.folder.iterdir()} <= {"step000002.partial"}, "one at a time"
    (tmp_path / "go").touch()
    stage.checkpoints.settle()
    assert not stage.checkpoints.holds
    assert stage.checkpoints.written == {2, 4}
    assert read_state(stage.checkpoints.folder / "step000004").consumed == named("0/1", "0/2", "0/3", "0/4")


@pytest.mark.slow
def test_a_checkpoint_that_takes_too_long_is_given_up_and_too_many_of_them_end_the_stage(cluster, tmp_path):
    config = composed("checkpoint.every=2", "checkpoint.deadline_s=0.5", "checkpoint.most_failures=2")
    context, told = stage_context(
        replace(config, run_root=str(tmp_path)), "rl", steps=9, learners=SlowLearners(tmp_path / "never")
    )
    stage = TrainingStage(context, (), patience=2)
    stage.save(2, {})
    began = time.monotonic()
    stage.checkpoints.settle()
    assert time.monotonic() - began < 30
    assert told.said == [
        "rl: the checkpoint of step 2 could not be written: it was not there within checkpoint.deadline_s=0.5 s"
    ]
    stage.save(4, {})
    with pytest.raises(
        RuntimeError, match=r"2 checkpoints of rl in a row .*most_failures=2\), the last because it was not"
    ):
        stage.checkpoints.settle()
    assert not context.saves


@ray.remote(num_cpus=0)
class _Actor:
    def pid(self):
        return os.getpid()

    def wait(self, seconds):
        time.sleep(seconds)
        return seconds


@pytest.mark.slow
def test_an_actors_death_is_told_for_every_call_it_leaves_and_waiting_goes_on(cluster):
    first, second = _Actor.remote(), _Actor.remote()
    deaths, values = [], []
    events = Events(60.0, StopSignal(), deaths.append)
    pid = ray.get(first.pid.remote(), timeout=60)
    for number in range(2):
        events.expect(first.wait.remote(60), f"call {number}", values.append)
    events.expect(second.wait.remote(0.5), "the other", values.append)
    os.kill(pid, signal.SIGKILL)
    while len(events):
        events.wait()
    assert sorted(death.what for death in deaths) == ["call 0", "call 1"]
    assert {death.error.actor_id for death in deaths} == {first._actor_id.hex()}
    assert values == [0.5]


@pytest.mark.slow
def test_a_stage_ends_when_the_learner_dies_and_says_during_what(cluster, tmp_path):
    book = SimpleNamespace(name_of=lambda error: "learner", explain=lambda error: f"the learner died: {error.actor_id}")
    actor = _Actor.remote()
    stage, _ = made(tmp_path)
    stage.context.session.book = book
    stage.events.expect(actor.wait.remote(60), "optimiser step 3", print)
    ray.kill(actor)
    said = f"an actor died during optimiser step 3: the learner died: {actor._actor_id.hex()}"
    with pytest.raises(RuntimeError, match=said):
        stage.events.wait()


@pytest.mark.slow
def test_a_reward_that_never_ends_costs_its_stream_in_a_scorers_process(cluster):
    terms = {"mine": {"target": "tests.support.stuck_reward:stuck"}}
    scorer = ray.remote(num_cpus=0)(Scorer).remote(RewardConfig(terms=terms, timeout_s=0.5))
    job = RewardJob("0/a", one_answer(), Plan(12, 1.0), (stream({2: "stuck"}), stream({5: "red"})))
    ((first, second),) = ray.get(scorer.score.remote((job,)), timeout=60)
    assert "reward.terms.mine: took longer than 0.5 s (reward.timeout_s), last in " in first.failed
    assert "stuck_reward.py:" in first.failed
    assert (second.failed, second.total) == (None, 1.0)
