"""Several learner ranks against one: real processes, gloo, DeepSpeed ZeRO 0-3, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks_lib import Call, Job, checkpoint, groups, learner_values, run, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EVEN = [3, 2, 4]
UNEVEN = [12, 1]
FEWER_THAN_RANKS = [3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def batches(model):
    """Three steps: even lengths, very uneven lengths, fewer groups than ranks; with frames and with features."""
    return {
        frames: [
            groups(model, turns, frames=frames, seed=i) for i, turns in enumerate((EVEN, UNEVEN, FEWER_THAN_RANKS))
        ]
        for frames in (False, True)
    }


def three_steps(model, batches, loss, **values):
    steps = [train(step, loss, items) for step, items in enumerate(batches)]
    return Job(str(model), learner_values(**values), (*steps, Call("weights")))


def values_of(update):
    return update.buffer.view(np.dtype(update.dtype))


@pytest.fixture(scope="module")
def alone(model, batches, tmp_path_factory):
    """Replies of one rank at stage 0, by loss and freeze."""
    made = {}

    def get(loss, freeze):
        if (loss, freeze) not in made:
            job = three_steps(model, batches[freeze == "none"], loss, freeze=freeze, zero_stage=0)
            made[loss, freeze] = run(job, 1, tmp_path_factory.mktemp("alone"))[0]
        return made[loss, freeze]

    return get


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("loss", "freeze"), [("sft", "none"), ("grpo", "none"), ("grpo", "tower+merger")])
def test_two_ranks_train_as_one(model, batches, alone, tmp_path, stage, loss, freeze):
    job = three_steps(model, batches[freeze == "none"], loss, freeze=freeze, zero_stage=stage, ranks=2)
    first, second = run(job, 2, tmp_path)
    wanted = alone(loss, freeze)
    print(wanted[:3], first[:3])
    moved = values_of(wanted[-1])
    got = values_of(first[-1])
    assert second[-1] is None
    assert got.dtype == np.float64
    print(stage, loss, freeze, "max difference", np.abs(got - moved).max())
    assert np.abs(got - moved).max() <= 1e-12
