"""The learner's ranks through real Ray actors: one call for the driver, and what a rank that dies does to it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import ray

from conf.schema import ClusterConfig, RunConfig
from learner.config import LearnerConfig
from learner.messages import Runs, TrainBatch, TrainGroup
from learner.setup import LearnerSetup
from rewards.compose import RewardConfig
from rollout.config import RolloutConfig
from runtime.cluster.events import wait_for
from runtime.cluster.session import Session
from runtime.placing.placement import plan_bundles
from streams.memory import MemoryConfig
from tests.support.learner import GRPO
from tests.support.ranks import LAYOUT, checkpoint, groups, learner_values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WAIT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def items(model):
    return groups(model, [6, 1, 2], media="features")


def config(ranks):
    return RunConfig(
        memory=MemoryConfig("rcsm", 2),
        learner=LearnerConfig(ranks=ranks),
        rollout=RolloutConfig(workers=1),
        reward=RewardConfig(terms={"correctness": {}}),
        cluster=ClusterConfig(num_cpus=2, placement="cpu", actor_cpus=0.25, call_timeout_s=WAIT_S),
    )


@pytest.fixture(scope="module")
def session():
    with Session(config(2)) as running:
        running.wait_ready()
        yield running


def setup_of(model, **values):
    learner = learner_values(freeze="tower+merger", collective_timeout_s=30, **values)
    return LearnerSetup(str(model), LAYOUT, learner, total_steps=10, seed=0, reference=str(model))


def batch_of(items, step=0, publish=True):
    made = tuple(
        TrainGroup(
            f"g{i}",
            ray.put(replace(item.payload, media=ray.put(item.payload.media))),
            tuple(Runs.of(values) for values in item.advantages),
            sum(map(len, item.payload.logs)),
        )
        for i, item in enumerate(items)
    )
    return TrainBatch(step, replace(GRPO, kl_coef=0.1), made, publish)


def test_ranks_have_a_bundle_each_and_the_workers_come_after_them():
    names = [bundle.name for bundle in plan_bundles(config(3), cluster_gpus=0)]
    assert names == ["learner rank 0", "learner rank 1", "learner rank 2", "rollout worker 0", "scorer"]
    gpus = replace(config(3), cluster=ClusterConfig(placement="auto"))
    assert [b.gpus for b in plan_bundles(gpus, cluster_gpus=4)] == [1, 1, 1, 1, 0]
    shared = [b.gpus for b in plan_bundles(gpus, cluster_gpus=3)]
    assert shared == [0.6, 0.6, 0.6, 0.4, 0], "two ranks never fit on one GPU"
    assert [b.gpus for b in plan_bundles(gpus, cluster_gpus=2)] == [0, 0, 0, 0, 0]


def test_a_group_of_two_trains_publishes_scores_saves_and_loads_as_one_learner(session, model, items, tmp_path):
    learners = session.learners
    parameters = learners.setup(setup_of(model, ranks=2, zero_stage=3), WAIT_S)
    report_ref, weights_ref = learners.train(batch_of(items))
    report = wait_for(report_ref, WAIT_S, "a step")
    update = wait_for(weights_ref, WAIT_S, "its weights")
    assert (report.step, report.version, update.version) == (0, 1, 1)
    assert report.metrics["target_tokens"] == sum(int(log.target.sum()) for i in items for log in i.payload.logs)
    assert report.metrics["kl"] >= 0
    assert sum(int(np.prod(shape)) for shape in update.shapes) == parameters
    scores = wait_for(learners.score(tuple(g.payload for g in batch_of(items).groups)), WAIT_S, "scores")
    assert scores.version == 1
    assert scores.diff.tokens == report.metrics["target_tokens"]
    saved = learners.save(str(tmp_path / "saved"), {"note": "here"}, limit_s=WAIT_S)
    # The next step is asked for at once: it is none of the checkpoint's.
    second = wait_for(learners.train(batch_of(items, 1, publish=False))[0], WAIT_S, "a second step")
    wait_for(saved, WAIT_S, "the checkpoint")
    # Another stage is set up on the same actors, and goes on from the saved state.
    learners.setup(setup_of(model, ranks=2, zero_stage=3), WAIT_S)
    assert wait_for(learners.load(str(tmp_path / "saved")), WAIT_S, "the checkpoint") == 1
    assert np.array_equal(wait_for(learners.weights(), WAIT_S, "weights").buffer, update.buffer)
    again = wait_for(learners.train(batch_of(items, 1, publish=False))[0], WAIT_S, "a second step")
    assert {k: v for k, v in again.metrics.items() if k != "step_s"} == {
        k: v for k, v in second.metrics.items() if k != "step_s"
    }


def test_what_cannot_be_written_is_told_with_its_rank_and_training_goes_on(session, model, items, tmp_path):
    """Found by the thread that writes, after the step that follows; the next checkpoint is written."""
    learners = session.learners
    learners.setup(setup_of(model, ranks=2, zero_stage=1), WAIT_S)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "hf").write_text("in the way")
    saved = learners.save(str(tmp_path / "saved"), {}, limit_s=WAIT_S)
    assert wait_for(learners.train(batch_of(items))[0], WAIT_S, "a step").version == 1
    with pytest.raises(RuntimeError, match=r"learner rank 0 of 2 failed during saving .*saved/hf"):
        wait_for(saved, WAIT_S, "the checkpoint")
    wait_for(learners.save(str(tmp_path / "again"), {}, limit_s=WAIT_S), WAIT_S, "the checkpoint")
    assert (tmp_path / "again" / "hf" / "model.safetensors").is_file()


def test_what_every_rank_refuses_is_the_groups_error(session, model, items):
    learners = session.learners
    learners.setup(setup_of(model, ranks=2, zero_stage=1), WAIT_S)
    wrong = [*items[:2], replace(items[2], advantages=items[2].advantages[:1])]
    with pytest.raises(
        RuntimeError, match=r"learner rank 0 of 2 failed during optimiser step 1: .*4 streams but 3 advant"
    ):
        wait_for(learners.train(batch_of(wrong))[0], WAIT_S, "a step that is refused")
    assert wait_for(learners.train(batch_of(items))[0], WAIT_S, "a step").version == 1


def test_a_rank_that_dies_is_named_long_before_any_timeout(session, model, items):
    """Last: it ruins the actors."""
    learners = session.learners
    learners.setup(setup_of(model, ranks=2, zero_stage=3), WAIT_S)
    waiting = learners.train(batch_of(items))[0]
    ray.kill(learners.actors[1])

    def go_on():
        reply = waiting
        for _ in range(50):
            # The step may have been over before the actor was.
            wait_for(reply, WAIT_S, "a step of a broken group")
            reply = learners.train(batch_of(items))[0]

    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"learner rank 1 of 2 died during optimiser step 1"):
        go_on()
    assert time.monotonic() - began < 20
