"""The learner's ranks: rendezvous, process group, and exchange of small objects between DeepSpeed's collectives.

Invariants:
- It imports no ray.
- No port is fixed: rank 0's store takes a free one on its own node and reports it. A single rank opens none.
- Every collective has the place's timeout, and the error of a rank that waited in vain names the rank and its wait.
- All ranks make the same calls in the same order: a rank that finds a fault reports it in `agree`, and never leaves the
  others waiting.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from learner.setup import RankPlace
from streams.support.doing import doing

T = TypeVar("T")
LOOPBACK = "127.0.0.1"


def open_store(place: RankPlace) -> dist.TCPStore:
    """Open rank 0's store on `place.port`, or on a free port if that is 0. Returns without waiting for other ranks.

    It listens where `place.host` is and nowhere else: whoever reaches the port can write into the store. (Everywhere, where
    the node has that address only in the eyes of others.)
    """
    timeout = timedelta(seconds=place.timeout_s)
    family = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0][0]
    try:
        listener = socket.create_server((place.host, place.port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        address = (place.host, place.port, place.world)
        return dist.TCPStore(*address, is_master=True, timeout=timeout, wait_for_workers=False)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        place.host,
        port,
        place.world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def prepare_environment(place: RankPlace) -> None:
    """Set what DeepSpeed reads from the environment. Call it before DeepSpeed is imported."""
    os.environ.update(
        RANK=str(place.rank),
        # A rank sees only the GPU that was reserved for it.
        LOCAL_RANK="0",
        WORLD_SIZE=str(place.world),
        MASTER_ADDR=place.host,
        MASTER_PORT=str(place.port),
    )
    if place.host == LOOPBACK and sys.platform == "linux":
        # Ranks that are all on this machine listen for nobody else.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        # Otherwise every start compiles a shared-memory all-reduce in C++, which takes half a minute and fails without
        # a compiler; gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Ranks:
    """This process's membership in the learner's process group, joined once and used by every engine after it."""

    def __init__(self, place: RankPlace, store: dist.TCPStore | None = None) -> None:
        """Join the process group. Rank 0 of several passes the store that it opened, to which the others connect.

        Raises RuntimeError if the ranks do not meet within `place.timeout_s`.
        """
        if place.world > 1 and place.rank == 0 and store is None:
            store = open_store(place)
        port = store.port if store is not None else place.port
        self.place = RankPlace(place.rank, place.world, place.host, port, place.timeout_s)
        prepare_environment(self.place)
        timeout = timedelta(seconds=place.timeout_s)
        if not dist.is_initialized():
            try:
                meeting: dist.Store
                if place.world == 1:
                    meeting = dist.HashStore()  # in memory: nobody else is to come
                else:
                    host = (place.host, place.port, place.world)
                    meeting = store or dist.TCPStore(*host, is_master=False, timeout=timeout)
                backend = "nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(
                    backend, store=meeting, rank=place.rank, world_size=place.world, timeout=timeout
                )
            except (RuntimeError, dist.DistError) as error:
                raise RuntimeError(
                    f"learner rank {place.rank} could not join the {place.world} ranks at {place.host}:{port} within "
                    f"{place.timeout_s:g} s (learner.collective_timeout_s): {error}"
                ) from error
        self._store = store
        # Small objects go over gloo on any machine: they never wait for, or allocate on, a GPU.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() != "gloo" else None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, the one that copies out and reports."""
        return self.place.rank == 0

    def gather(self, value: T, what: str) -> list[T]:
        """Return every rank's value, in the order of the ranks, on every rank.

        what: what the ranks wait for here. Raises RuntimeError if a rank is lost or the timeout passes.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            with doing(f"waits for the other ranks {what}"):
                dist.all_gather_object(values, value, group=self._group)
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(
                f"learner rank {self.rank} of {self.world} waited for the other ranks ({what}) and lost one, or "
                f"{self.place.timeout_s:g} s (learner.collective_timeout_s) went by: {error}"
            ) from error
        return values

    def agree(self, problem: Exception | None, what: str) -> None:
        """Raise the first problem that any rank found, on every rank. The message names it if there are several."""
        for rank, found in enumerate(self.gather(problem, what)):
            if found is not None:
                raise found if self.world == 1 else type(found)(f"learner rank {rank}: {found}")
