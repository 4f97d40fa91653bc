"""Where the actors of a session may run: room that Ray reserves for them on nodes, all at once or one by one.

Invariants:
* those that a run begins with get room together, or none;
* each of the others gets room as soon as some node has it, also on a node that joins later;
* room on a node that is lost is looked for anew, by Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runtime.placing.preflight import Bundle
from runtime.planning.object_store import NodeStore

QUIET_WAIT_S = 2.0
"""How long to wait for resources before saying so."""
JOIN_WAIT_S = 5.0
"""How long a run waits for the room of those that it can begin without."""
POLL_S = 0.2

log = logging.getLogger("sightline.cluster")


class NoRoomError(RuntimeError):
    """No node has room for an actor that the run waits for."""


@dataclass(frozen=True)
class _Seat:
    """A bundle of a placement group."""

    group: PlacementGroup
    index: int


class Seats:
    """The room of a session's actors, in the order of `bundles`. `close` gives it back."""

    def __init__(self, bundles: Sequence[Bundle], name: str) -> None:
        """name: of the placement groups. Ray is asked for all of it at once."""
        self.bundles = tuple(bundles)
        self._name = name
        together = [i for i, bundle in enumerate(bundles) if not bundle.joins]
        self._together = self._ask([bundles[i] for i in together], name)
        self._seats = {i: _Seat(self._together, index) for index, i in enumerate(together)}
        for i, bundle in enumerate(bundles):
            if bundle.joins:
                self._seats[i] = _Seat(self._ask([bundle], f"{name}/{bundle.name}"), 0)

    def wait(self, timeout_s: float) -> list[str]:
        """Wait until there is room for those that the run begins with; return the names of the others that have none.

        Raises TimeoutError.
        """
        if not self._together.wait(timeout_seconds=min(QUIET_WAIT_S, timeout_s)):
            # The actors of a killed run end by themselves within seconds, those of another run when it ends.
            begins = [bundle.name for bundle in self.bundles if not bundle.joins]
            log.warning("waiting up to %g s for room for %d actors; free now: %s", timeout_s, len(begins), free())
            if not self._together.wait(timeout_seconds=timeout_s):
                raise TimeoutError(
                    f"waited {timeout_s:g} s (cluster.start_timeout_s) for Ray to place {len(begins)} actors "
                    f"({', '.join(begins)}): other runs hold the rest of the cluster; free now: {free()}. "
                    "`ray list actors --filter state=ALIVE` and `ray list placement-groups` name who holds what"
                )
        deadline = time.monotonic() + min(JOIN_WAIT_S, timeout_s)
        while True:
            without = [b.name for i, b in enumerate(self.bundles) if b.joins and not self.has_room(i)]
            if not without or time.monotonic() > deadline:
                return without
            time.sleep(POLL_S)

    def has_room(self, index: int) -> bool:
        """Return whether a node holds room for this actor, as far as Ray knows: a loss it notices within some 15 s."""
        seat = self._seats[index]
        return bool(placement_group_table(seat.group)["bundles_to_node_id"].get(seat.index))

    def stores(self) -> tuple[NodeStore, ...]:
        """Return the object stores of the nodes that hold room, with the actors that have it there."""
        homes: dict[str, list[str]] = {}
        for bundle, seat in ((bundle, self._seats[i]) for i, bundle in enumerate(self.bundles)):
            if node := placement_group_table(seat.group)["bundles_to_node_id"].get(seat.index):
                homes.setdefault(node, []).append(bundle.name)
        return tuple(
            NodeStore(
                entry["NodeManagerAddress"],
                int(entry["Resources"].get("object_store_memory", 0)),
                tuple(actors),
                entry["NodeID"],
            )
            for entry in ray.nodes()
            if (actors := homes.get(entry["NodeID"]))
        )

    def check(self, index: int) -> None:
        """Raise NoRoomError if no node holds room for this actor."""
        if not self.has_room(index):
            raise NoRoomError(self.in_words([index]))

    def in_words(self, without: Sequence[int]) -> str:
        """Return that these actors have no room, with the arithmetic."""
        named = ", ".join(f"{b.name}: {b.cpus:g} CPUs, {b.gpus:g} GPUs" for b in (self.bundles[i] for i in without))
        return f"no node has room ({named}; free now: {free()})"

    def strategy(self, index: int) -> PlacementGroupSchedulingStrategy:
        """Return where Ray has to start this actor."""
        seat = self._seats[index]
        return PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.index)

    def close(self) -> None:
        for group in {seat.group.id: seat.group for seat in self._seats.values()}.values():
            remove_placement_group(group)

    @staticmethod
    def _ask(bundles: Sequence[Bundle], name: str) -> PlacementGroup:
        return placement_group([_shape(bundle) for bundle in bundles], strategy="PACK", name=name)


def free() -> str:
    """Return the free CPUs and GPUs of the cluster, in words."""
    found = ray.available_resources()
    return f"{found.get('CPU', 0.0):g} CPUs, {found.get('GPU', 0.0):g} GPUs"


def _shape(bundle: Bundle) -> dict[str, float]:
    return {"CPU": bundle.cpus} | ({"GPU": bundle.gpus} if bundle.gpus else {})
