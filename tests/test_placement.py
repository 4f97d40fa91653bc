"""Whether all actors fit is known, and said with the arithmetic, before any of them starts."""

from __future__ import annotations

import time

import pytest

from conf.schema import ClusterConfig, RunConfig
from rl.cluster import Bundle, check_fits, plan_bundles
from rollout.config import RolloutConfig
from streams.memory import MemoryConfig
from tests.test_run import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def config(workers, actor_cpus=0.25, placement="auto"):
    return RunConfig(
        memory=MemoryConfig("full"),
        rollout=RolloutConfig(workers=workers),
        cluster=ClusterConfig(placement=placement, actor_cpus=actor_cpus),
    )


def test_a_run_that_does_not_fit_stops_at_start_with_the_arithmetic(tmp_path):
    began = time.monotonic()
    done = launch(
        f"run_root={tmp_path / 'out'}",
        "job=sft",
        "data=jsonl",
        f"data.train={own_data(tmp_path)}",
        f"data.heldout={own_data(tmp_path)}",
        "rollout.workers=40",
        "cluster.actor_cpus=1",
        "cluster.num_cpus=2",
        "tracking.enabled=false",
        limit_s=150,
    )
    assert done.returncode == 2
    assert "the actors need 42 CPUs (learner 1 + rollout worker 0 1 + " in done.stderr
    assert "scorer 1) but the cluster has 2: lower rollout.workers or cluster.actor_cpus" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 120


def own_data(folder):
    """A task file whose video is never opened: the run ends before."""
    path = folder / "rows.jsonl"
    path.write_text(
        '{"id": "a", "video": "a.mp4", "end": 3, "queries": [{"time": 0, "text": "now?"}], '
        '"answers": [{"time": 1, "text": "red"}]}\n'
    )
    return path


def test_every_actor_has_a_bundle_and_the_learner_comes_first():
    bundles = plan_bundles(config(3, 0.5), cluster_gpus=0)
    assert [b.name for b in bundles] == [
        "learner",
        "rollout worker 0",
        "rollout worker 1",
        "rollout worker 2",
        "scorer",
    ]
    assert all((b.cpus, b.gpus) == (0.5, 0.0) for b in bundles)


@pytest.mark.parametrize(
    ("placement", "gpus", "each"), [("auto", 2, 0.0), ("auto", 3, 1.0), ("auto", 8, 1.0), ("cpu", 8, 0.0)]
)
def test_gpus_are_used_only_if_learner_and_all_workers_get_one(placement, gpus, each):
    bundles = plan_bundles(config(2, placement=placement), cluster_gpus=gpus)
    assert [b.gpus for b in bundles] == [each, each, each, 0.0]


def test_a_cluster_that_is_just_large_enough_fits():
    check_fits(plan_bundles(config(2), 0), {"CPU": 1.0})
    # Ten tenths do not sum to exactly one.
    check_fits([Bundle(str(i), 0.1, 0.0) for i in range(10)], {"CPU": 1.0})


def test_cpus_that_are_missing_are_counted_by_actor():
    with pytest.raises(ValueError, match=r"need 1\.25 CPUs .*learner 0\.25 \+ rollout worker 0 0\.25.*cluster has 1:"):
        check_fits(plan_bundles(config(3), 0), {"CPU": 1.0})


def test_gpus_that_are_missing_are_counted_by_actor():
    bundles = [Bundle("learner", 0.5, 1.0), Bundle("rollout worker 0", 0.5, 1.0), Bundle("scorer", 0.5, 0.0)]
    with pytest.raises(ValueError, match=r"need 2 GPUs \(learner 1 \+ rollout worker 0 1 \+ scorer 0\).*has 1:"):
        check_fits(bundles, {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(ValueError, match=r"need 2 GPUs .*has 0:"):
        check_fits(bundles, {"CPU": 8.0})
    check_fits(bundles, {"CPU": 8.0, "GPU": 2.0})
