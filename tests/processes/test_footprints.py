"""What a local run shows to others: nothing listens beyond this machine, and nothing is left soon after its driver."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.killed_runs import Driver
from tests.support.processes import command, family, still_there

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LISTEN = "0A"
OUTLIVES_S = 10.0


def sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    return found


def listening() -> dict[str, ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The address that each listening TCP socket of this machine is bound to, by inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                packed = bytes.fromhex(fields[1].partition(":")[0])
                # Words of four bytes, the lowest first.
                words = [packed[i : i + 4][::-1] for i in range(0, len(packed), 4)]
                address = ipaddress.ip_address(b"".join(words))
                found[fields[9]] = getattr(address, "ipv4_mapped", None) or address
    return found


def test_a_local_run_listens_for_this_machine_only_and_nothing_of_it_outlives_a_killed_driver_for_long(tmp_path):
    driver = Driver(tmp_path / "run", "learner.ranks=2")
    driver.wait_for_step("rl", 1)
    bound, known = listening(), family(driver.process.pid)
    found = [(command(pid), bound[inode]) for pid in known for inode in sockets(pid) & bound.keys()]
    names = {pid: command(pid) for pid in known}
    driver.signal(signal.SIGKILL)
    killed = time.monotonic()
    driver.wait()
    for name in ("gcs_server", "raylet", "learner-0", "learner-1", "rollout-0", "scorer"):
        assert any(name in line for line, _ in found), f"{name} listens somewhere: {found}"
    assert [(line, address) for line, address in found if not address.is_loopback] == []
    while still_there(known) and time.monotonic() < killed + OUTLIVES_S:
        time.sleep(0.1)
    assert [names[pid] for pid in still_there(known)] == []
