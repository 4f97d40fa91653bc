"""A run on a Ray cluster of several nodes, all on this machine, of which whole ones are taken away.

Invariant: there is a node to spare for every hit, so that what was on the lost one finds room.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.faults import Fault, replaced
from benchmarks.chaos.subject import Subject
from tests.support.killed_runs import pid_of
from tests.support.processes import family
from tests.support.ray_head import RayHead

NODE_HITS = ("node of a worker", "node of the learner")
NODES_USED = 2
"""Four actors on half a CPU each fill nodes of one CPU."""
ON_NODES = ("cluster.address=auto", "cluster.actor_cpus=0.5")


@contextmanager
def run_on_nodes(root: Path, *overrides: str) -> Iterator[tuple[Subject, Mapping[str, Fault]]]:
    """Start a run on a cluster of its own; yield it, and what NODE_HITS do to it."""
    with RayHead(0) as head:
        for _ in range(NODES_USED + len(NODE_HITS)):
            head.add_node(1)
        subject = Subject(root, *ON_NODES, *overrides, environment=head.joining)

        def node_of(actor: str) -> int:
            pid = pid_of(subject.root, actor)
            return next((node for node in head.nodes if pid in family(node)), 0)

        def take_away(subject: Subject, actor: str) -> None:
            if node := node_of(actor):
                head.lose_node(node)

        def of_a_worker(subject: Subject, chance: random.Random) -> None:
            workers = ["rollout-0", "rollout-1"]
            without_learner = [name for name in workers if node_of(name) != node_of("learner")]
            replaced(chance.choice(without_learner or workers), take_away)(subject, chance)

        try:
            yield subject, dict(zip(NODE_HITS, (of_a_worker, replaced("learner", take_away)), strict=True))
        finally:
            subject.kill_all()
