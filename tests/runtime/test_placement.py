"""Whether all actors fit is known, and said with the arithmetic, before any of them starts."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ClusterConfig, RunConfig
from learner.config import LearnerConfig
from rewards.compose import RewardConfig
from rollout.config import RolloutConfig
from runtime.placing.placement import placement_note, plan_bundles
from runtime.placing.preflight import Bundle, Node, check_resources, unplaced
from streams.memory import MemoryConfig
from tests.support.commands import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def config(workers, actor_cpus=0.25, placement="auto", least=1):
    return RunConfig(
        memory=MemoryConfig("full"),
        rollout=RolloutConfig(workers=workers, min_workers=least),
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
        "rollout.min_workers=40",
        "cluster.actor_cpus=1",
        "cluster.num_cpus=2",
        "tracking.enabled=false",
        limit_s=150,
    )
    assert done.returncode == 2
    assert "the actors need 42 CPUs (learner 1 + rollout worker 0 1 + " in done.stderr
    assert "scorer 1) but the cluster has 2: lower rollout.min_workers, " in done.stderr
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
    several = replace(config(1), reward=RewardConfig(workers=2))
    assert [b.name for b in plan_bundles(several, cluster_gpus=0)][1:] == ["rollout worker 0", "scorer 0", "scorer 1"]


@pytest.mark.parametrize(
    ("placement", "gpus", "learner", "worker"),
    [
        ("auto", 0, 0.0, 0.0),
        ("auto", 1, 0.6, 0.1333),
        ("auto", 2, 0.6, 0.2),
        ("auto", 3, 0.6, 0.4),
        ("auto", 4, 1.0, 1.0),
        ("auto", 8, 1.0, 1.0),
        ("cpu", 8, 0.0, 0.0),
    ],
)
def test_every_actor_gets_a_gpu_or_a_share_of_one(placement, gpus, learner, worker):
    bundles = plan_bundles(config(3, placement=placement), cluster_gpus=gpus)
    assert [b.gpus for b in bundles] == [learner, worker, worker, worker, 0.0]
    assert unplaced(bundles, [node(64.0, float(gpus))]) == []
    assert ("share" in placement_note(config(3, placement=placement), gpus)) == (0 < learner < 1)


@pytest.mark.parametrize(
    ("placement", "gpus", "said"),
    [
        (
            "separated",
            0,
            r"needs 4 GPUs \(learner\.ranks=1 \+ rollout\.workers=3\), the cluster has 0: cluster\.placement=auto",
        ),
        ("separated", 3, r"needs 4 GPUs .*, the cluster has 3: cluster\.placement=colocated shares them, "),
        ("colocated", 0, r"needs 1 GPUs \(learner\.ranks=1\), the cluster has 0: "),
    ],
)
def test_a_placement_that_cannot_be_is_refused_with_the_arithmetic(placement, gpus, said):
    with pytest.raises(ValueError, match=rf"cluster\.placement={placement} {said}"):
        plan_bundles(config(3, placement=placement, least=3), cluster_gpus=gpus)


def test_gpus_that_nobody_uses_are_said():
    ranks = replace(config(1, placement="auto"), learner=LearnerConfig(ranks=2))
    assert "1 GPUs are not used: learner.ranks=2" in placement_note(ranks, 1)
    assert placement_note(ranks, 0) == ""


def node(cpus, gpus=0.0, name="n"):
    return Node(name, name, cpus, gpus)


def test_a_cluster_that_is_just_large_enough_fits():
    assert check_resources(plan_bundles(config(2), 0), [node(1.0)]) == []
    # Ten tenths do not sum to exactly one.
    assert check_resources([Bundle(str(i), 0.1, 0.0) for i in range(10)], [node(1.0)]) == []


def test_cpus_that_are_missing_are_counted_by_actor():
    (problem,) = check_resources(plan_bundles(config(3, least=3), 0), [node(1.0)])
    assert re.search(r"need 1\.25 CPUs .*learner 0\.25 \+ rollout worker 0 0\.25.*cluster has 1:", problem)


def test_gpus_that_are_missing_are_counted_by_actor():
    bundles = [Bundle("learner", 0.5, 1.0), Bundle("rollout worker 0", 0.5, 1.0), Bundle("scorer", 0.5, 0.0)]
    (problem,) = check_resources(bundles, [node(8.0, 1.0)])
    assert re.search(r"need 2 GPUs \(learner 1 \+ rollout worker 0 1 \+ scorer 0\).*has 1:", problem)
    problems = check_resources(bundles, [node(8.0)])
    assert re.search(r"need 2 GPUs .*has 0:", problems[0])
    assert check_resources(bundles, [node(8.0, 2.0)]) == []


def test_an_actor_larger_than_any_node_is_named_with_what_the_nodes_have():
    problems = check_resources([Bundle("learner", 3.0, 0.0)], [node(2.0, name="a"), node(2.0, name="b")])
    assert len(problems) == 1
    assert "no single node has what learner needs (3 CPUs and 0 GPUs; a has 2 CPUs and 0 GPUs, b has 2" in problems[0]


def test_a_sum_that_suffices_is_not_enough_where_no_node_has_room_for_a_whole_actor():
    bundles = [Bundle(f"rollout worker {i}", 2.0, 0.0) for i in range(3)]
    (problem,) = check_resources(bundles, [node(3.0, name="a"), node(3.0, name="b")])
    assert "no room is left for rollout worker 2 (a has 3 CPUs" in problem
    assert check_resources(bundles, [node(4.0), node(2.0)]) == []


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=4),
)
def test_what_is_said_to_fit_does_fit(wanted, sizes):
    """Against every assignment. Greedy placement may miss one that exists, never invent one."""
    bundles = [Bundle(str(i), c, g) for i, (c, g) in enumerate(wanted)]
    nodes = [node(c, g, str(i)) for i, (c, g) in enumerate(sizes)]

    def possible(left, free):
        if not left:
            return True
        first, rest = left[0], left[1:]
        return any(
            c >= first.cpus
            and g >= first.gpus
            and possible(rest, [*free[:i], (c - first.cpus, g - first.gpus), *free[i + 1 :]])
            for i, (c, g) in enumerate(free)
        )

    if not check_resources(bundles, nodes):
        assert possible(bundles, sizes)


@given(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_equal_actors_are_placed_whenever_they_can_be(count, sizes, cpus):
    bundles = [Bundle(str(i), cpus, 0) for i in range(count)]
    room = sum(size // cpus for size in sizes)
    assert len(unplaced(bundles, [node(size) for size in sizes])) == max(0, count - room)
