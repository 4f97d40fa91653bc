"""What is said to be free of a machine is what may be used of it."""

from __future__ import annotations

import pytest

from runtime.planning.device_plan import DevicePlan
from runtime.planning.footprint import Footprint
from runtime.planning.usage import usage_lines, usage_report
from streams.support import meter
from streams.support.usage import DeviceInfo, PhaseUsage, ProcessUsage

MIB = 2**20


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A container of 4 GiB on a machine of 64, as the kernel's files show it."""
    monkeypatch.setattr(meter, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(meter, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: {65536 * 1024} kB\nMemAvailable: {60000 * 1024} kB\n")
    (tmp_path / "memory.max").write_text(f"{4096 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{3900 * MIB}\n")
    return tmp_path


def test_cached_files_of_a_container_count_as_free(kernel):
    assert meter.host_memory() == (4096 * MIB, 196 * MIB)
    (kernel / "memory.stat").write_text(f"anon {500 * MIB}\ninactive_file {3000 * MIB}\nactive_file {400 * MIB}\n")
    assert meter.host_memory() == (4096 * MIB, 3196 * MIB)


def test_without_a_limit_the_machine_counts(kernel):
    (kernel / "memory.max").write_text("max\n")
    assert meter.host_memory() == (65536 * MIB, 60000 * MIB)


def test_a_system_without_the_kernels_files_has_its_memory_too(kernel):
    (kernel / "meminfo").unlink()
    total, free = meter.host_memory()
    assert total == free > 256 * MIB


def test_every_peak_is_beyond_what_the_process_held_before():
    device = DeviceInfo("n/host", "the host memory of n", False, 2**34, 2**33, 600 * MIB)
    phases = {"load": PhaseUsage(2.0, 1, 700 * MIB), "step": PhaseUsage(9.0, 3, 0)}
    plan = DevicePlan(1, (), (Footprint("rollout worker", (("weights", 200 * MIB),)),), (device,))
    report = usage_report([ProcessUsage("rollout worker 1", phases, 0)], plan, {})
    process = report["processes"]["rollout worker 1"]
    assert process["peak_bytes"] == process["phases"]["load"]["peak"] == 100 * MIB
    assert process["estimated_bytes"] == 200 * MIB
    assert usage_lines(report) == [
        "usage: rollout worker 1: load 2.0 s (100.0 MiB), step 9.0 s; peak 100.0 MiB, estimated 0.20 GiB"
    ]
