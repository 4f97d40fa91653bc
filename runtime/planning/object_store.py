"""What Ray's object store must hold on each node, compared with its size before anything is loaded.

Pure arithmetic. Clips and logs of the groups under way lie there, features that the driver keeps references to, and versions
of the weights. Learner ranks fetch a batch onto their nodes; a group begins on the node of its worker.

Invariants:
* a store that cannot hold two versions and one batch is refused with the arithmetic and ways out;
* one that holds those, but not all that may be alive at once, is warned about: Ray then writes objects to disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.age import age_bound
from conf.schema import RunConfig
from learner.config import LearnerConfig
from runtime.planning.clip_cache import chunk_size
from runtime.planning.footprint import BYTES, gib, trained_numbers
from runtime.planning.stream_size import StreamSize
from streams.backbone.boundary import Boundary
from streams.checkpoint.model_shape import ModelGeometry
from streams.log.record import BYTES_PER_TOKEN

VERSIONS = 2
"""Versions of the weights that may be alive at once (`rl.versions`)."""

SFT_BATCHES = 3
"""Batches of demonstrations that are alive at once: one is trained, two are laid out ahead (`sft.loop`)."""


@dataclass(frozen=True)
class NodeStore:
    """The object store of a node. size: bytes; actors: what the run has placed there, by bundle name; id: Ray's of the node."""

    node: str
    size: int
    actors: tuple[str, ...]
    id: str = ""

    @property
    def learns(self) -> bool:
        return any(actor.startswith("learner") for actor in self.actors)

    @property
    def workers(self) -> int:
        return sum(actor.startswith("rollout") for actor in self.actors)


@dataclass(frozen=True)
class StoreNeed:
    """Bytes that a stage keeps in object stores.

    Attributes:
        version: of one version of the weights; 0 where none is published.
        group: of one group: its longest clip and the logs of its streams. For SFT, of one demonstration.
        batch, alive: groups of a step; most groups at once.
        features: that the driver keeps references to.
    """

    stage: str
    version: int
    group: int
    batch: int
    alive: int
    features: int

    def least(self, store: NodeStore, workers: int) -> int:
        """Return what a node must hold at once, or no step can be made. workers: of the whole run."""
        groups = self.batch if store.learns else -(-self.batch * store.workers // workers)
        return VERSIONS * self.version + groups * self.group

    def most(self, store: NodeStore, workers: int) -> int:
        """Return what may lie on a node at once."""
        made = -(-self.alive * store.workers // workers)
        groups = max(made, self.batch) if store.learns else made
        return VERSIONS * self.version + groups * self.group + self.features * store.workers // workers


def store_need(
    config: RunConfig, geometry: ModelGeometry, learner: LearnerConfig, stage: str, stream: StreamSize
) -> StoreNeed:
    """Return what a training stage keeps in object stores. stream: the largest one."""
    log = BYTES_PER_TOKEN * stream.tokens
    # Demonstrations travel as frames, whatever trains.
    kind = (Boundary.NONE if stage == "sft" else learner.boundary).ships
    clip = stream.turns * chunk_size(geometry, kind, config.model.dtype, config.data.video).nbytes
    if stage == "sft":
        return StoreNeed(stage, 0, clip + log, config.sft.batch, SFT_BATCHES * config.sft.batch, 0)
    age = age_bound(config)
    version = trained_numbers(geometry, learner) * BYTES[config.model.dtype]
    kept = 0 if kind == "frames" else min(config.data.cache_mb * 2**20, stream.tasks * clip)
    return StoreNeed(stage, version, clip + config.algorithm.group_size * log, age.batch, age.capacity, kept)


def check_object_store(need: StoreNeed, stores: Sequence[NodeStore]) -> list[str]:
    """Return lines with the arithmetic, warnings among them. Raises ValueError if a step could not be made."""
    workers = max(1, sum(store.workers for store in stores))
    unit = "demonstrations" if need.stage == "sft" else "groups"
    versions = f"{VERSIONS} versions of the weights x {gib(need.version)} + " if need.version else ""
    features = f" + features that are kept {gib(need.features)}" if need.features else ""
    words = (
        f"object store of {need.stage}: {versions}up to {need.alive} {unit} x {gib(need.group)}{features}; a step needs "
        f"{need.batch} of them"
    )
    lines = []
    for store in stores:
        least, most = need.least(store, workers), need.most(store, workers)
        here = f"{gib(store.size)} on node {store.node} ({', '.join(store.actors)})"
        if store.size < least:
            raise ValueError(
                f"{words}: {gib(least)} at once, but the object store has only {here}. Give it more: a local Ray takes 30 % of "
                "the memory and no more than /dev/shm has (in a container --shm-size); a cluster's nodes, `ray start "
                f"--object-store-memory`. Or need less: {_ways_out(need)}"
            )
        if store.size < most:
            lines.append(
                f"warning: {words}: up to {gib(most)} at once, more than {here}: Ray will write some of it to disk and read "
                f"it back, which is slow. A larger store, or {_ways_out(need)}, avoids that"
            )
        else:
            lines.append(f"{words}: up to {gib(most)} of {here}")
    return lines


def _ways_out(need: StoreNeed) -> str:
    size = "smaller clips (data.video.max_pixels, data.max_turns)"
    if need.stage == "sft":
        return f"a smaller sft.batch, {size}"
    ways = ["fewer algorithm.groups_in_flight or algorithm.groups_per_step", size]
    if need.features:
        ways.append("a smaller data.cache_mb")
    return ", ".join(ways) + ", more that is frozen (learner.freeze)"
