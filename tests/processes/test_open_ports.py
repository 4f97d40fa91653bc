"""A local run, with all that it starts, listens for this machine only."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
from pathlib import Path

import pytest

from tests.support.killed_runs import Driver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LISTEN = "0A"


def family(pid: int) -> dict[int, str]:
    """A process and all that descend from it, with their command lines."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, before = {pid}, set()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in found}


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


def test_nothing_of_a_local_run_listens_beyond_this_machine(tmp_path):
    driver = Driver(tmp_path / "run", "learner.ranks=2")
    driver.wait_for_step("rl", 1)
    bound = listening()
    found = [
        (command, bound[inode])
        for pid, command in family(driver.process.pid).items()
        for inode in sockets(pid) & bound.keys()
    ]
    driver.signal(signal.SIGTERM)
    assert driver.wait() == 75, driver.output
    for name in ("gcs_server", "raylet", "learner-0", "learner-1", "rollout-0", "scorer"):
        assert any(name in command for command, _ in found), f"{name} listens somewhere: {found}"
    assert [(command, address) for command, address in found if not address.is_loopback] == []
