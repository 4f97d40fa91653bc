"""How often a learner may be lost, and which losses count; without processes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayTaskError

from conf.platform import ClusterConfig
from learner.messages import RankDiedError
from runtime.recovery import restarts
from runtime.recovery.restarts import LearnerLoss, Restarts, learner_loss, words_of

CRASH = LearnerLoss("learner died (pid 1): it was killed\nits log is here", outside=False)
DRAINED = LearnerLoss("learner died: its node has died", outside=True)


def rules(learner_restarts: int = 3, preemptions: int = 20) -> Restarts:
    return Restarts(ClusterConfig(learner_restarts=learner_restarts, preemptions=preemptions))


def test_as_many_restarts_as_are_allowed_and_then_the_first_cause():
    found = rules(learner_restarts=2)
    assert found.allow("sft", 3, CRASH, RuntimeError()) == "restart 1 of 2"
    assert found.allow("rl", 1, CRASH, RuntimeError()) == "restart 2 of 2"
    with pytest.raises(
        RuntimeError, match=r"died 3 times, cluster.learner_restarts=2\. The first time, at sft step 3: lea"
    ):
        found.allow("rl", 9, CRASH, RuntimeError())


def test_a_second_failure_that_comes_no_further_ends_the_run():
    found = rules()
    found.allow("rl", 8, CRASH, RuntimeError())
    with pytest.raises(
        RuntimeError, match=r"died twice at rl step 8 without getting further\. The first time, at rl step 8"
    ):
        found.allow("rl", 8, CRASH, RuntimeError())


def test_without_restarts_the_error_itself_ends_the_run():
    error = RuntimeError("an actor died")
    with pytest.raises(RuntimeError) as raised:
        rules(learner_restarts=0).allow("rl", 8, CRASH, error)
    assert raised.value is error


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=12), st.integers(0, 4), st.integers(0, 4))
def test_losses_from_outside_have_a_number_of_their_own(losses, most, most_outside):
    found = rules(most, most_outside)
    failures = outside = 0
    for from_outside, further in losses:
        outside, failures = outside + from_outside, failures + (not from_outside)
        step = 10 * failures + further  # every failure comes further than the one before
        loss = DRAINED if from_outside else CRASH
        if (outside if from_outside else failures) > (most_outside if from_outside else most):
            with pytest.raises(RuntimeError):
                found.allow("rl", step, loss, RuntimeError())
            return
        assert found.allow("rl", step, loss, RuntimeError()).startswith("loss" if from_outside else "restart")


def test_deaths_are_counted_on_from_what_this_run_found():
    found = rules()
    state = SimpleNamespace(counters={"deaths": {"scorer": 2}})
    found.deaths("rl", state)["learner"] += 1
    # The next attempt goes on from a checkpoint that has them.
    again = SimpleNamespace(counters={"deaths": {"scorer": 2, "learner": 1}})
    assert found.deaths("rl", again) == Counter(scorer=2, learner=1)
    assert found.deaths("sft", None) == Counter()


def test_a_row_that_ends_its_workers_stays_known_in_the_next_attempt():
    found = rules()
    suspects = found.suspects("rl")
    for _ in range(2):
        suspects.sent(0, "1/fatal")
        suspects.died(0, "it crashed")
    suspects.sent(1, "1/other")
    again = found.suspects("rl")
    assert again.condemned("0/fatal") == "it ended the workers that had it alone, 2 times: it crashed"
    assert again.may_take(1, "0/fatal"), "nothing is under way"
    assert found.suspects("sft").condemned("0/fatal") is None


def test_words_are_one_line():
    assert words_of(CRASH) == "learner died (pid 1): it was killed"


def test_an_error_of_ray_that_ends_the_run_is_told_in_words():
    with pytest.raises(RuntimeError, match="learner died") as raised:
        rules(learner_restarts=0).allow("rl", 8, CRASH, RayTaskError("swap", "traceback", OSError()))
    assert not isinstance(raised.value, RayTaskError)


# --- what is a loss of the learner ------------------------------------------------------------------------------------


def death(actor: str, text: str = "") -> ActorDiedError:
    error = ActorDiedError(text) if text else ActorDiedError()
    error.actor_id = actor
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class _Remote:
    def __init__(self, reply) -> None:
        self.warm_up = SimpleNamespace(remote=lambda: reply)


@pytest.fixture
def session(monkeypatch):
    def get(reply, timeout):
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(restarts.ray, "get", get)
    book = SimpleNamespace(
        name_of=lambda error: {"1": "learner-0", "2": "rollout-1"}.get(error.actor_id, ""),
        explain=lambda error: f"died {error.actor_id}",
    )
    return SimpleNamespace(book=book, learners=SimpleNamespace(actors=[_Remote(7)]))


def test_a_learner_that_died_is_a_loss_wherever_the_run_noticed_it(session):
    assert learner_loss(caused(RuntimeError("during a step"), death("1")), session) == LearnerLoss("died 1", False)
    rank = RayTaskError("join", "traceback", RankDiedError("learner rank 1 of 2 died: gone")).as_instanceof_cause()
    assert isinstance(rank, RankDiedError)
    assert learner_loss(rank, session) == LearnerLoss("learner rank 1 of 2 died: gone", False)
    assert learner_loss(caused(RuntimeError("the final checkpoint"), rank), session) is not None


def test_other_failures_are_none(session):
    assert learner_loss(RuntimeError("learner and engine disagree"), session) is None
    assert learner_loss(caused(RuntimeError("during a swap"), death("2")), session) is None
    assert learner_loss(RayTaskError("train", "traceback", RuntimeError("CUDA out of memory")), session) is None


def test_lost_weights_are_the_learners_loss_only_if_it_is_dead(session):
    lost = RayTaskError("swap", "traceback", ObjectLostError("0" * 56, None, ""))
    assert learner_loss(lost, session) is None, "it answers"
    session.learners.actors = [_Remote(GetTimeoutError())]
    assert learner_loss(lost, session) is None, "it is busy"
    session.learners.actors = [_Remote(7), _Remote(death("1"))]
    assert learner_loss(lost, session) == LearnerLoss("died 1", False)


@pytest.mark.parametrize("words", ["The process receives a SIGTERM.", "because its node has died. Node Id: 1"])
def test_what_came_from_outside_is_told_by_rays_words(session, words):
    class Told(ActorDiedError):
        def __str__(self) -> str:
            return words

    error = Told()
    error.actor_id = "1"
    assert learner_loss(caused(RuntimeError(), error), session) == LearnerLoss("died 1", True)
