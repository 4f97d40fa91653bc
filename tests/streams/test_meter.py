"""What is said to be free of a machine is what may be used of it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

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


class Allocator:
    """torch.cuda's counters, as its allocator keeps them on the host; every wait and every reset is counted."""

    def __init__(self, monkeypatch):
        self.held = self.most = self.waits = self.resets = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)

    def wait(self):
        self.waits += 1

    def reset(self):
        self.resets += 1
        self.most = self.held

    def use(self, size):
        """Allocate beside what is held, and free it again."""
        self.most = max(self.most, self.held + size)


def test_a_repeated_phase_neither_waits_nor_resets_and_has_its_peak_all_the_same(monkeypatch):
    device = Allocator(monkeypatch)
    measured = meter.Meter()
    with measured.phase("load"):
        device.held = 100
        device.use(900)
    before = (device.waits, device.resets)
    for size in (5, 70, 30):
        with measured.repeated("engine step"):
            device.use(size)
    assert (device.waits, device.resets) == before
    with measured.phase("swap"):
        device.use(400)
    with measured.repeated("engine step"):
        device.use(20)
    found = measured.usage()
    assert {name: (phase.calls, phase.peak) for name, phase in found.items()} == {
        "load": (1, 1000),
        "engine step": (4, 170),
        "swap": (1, 500),
    }
    assert measured.usage() == found
    with measured.repeated("engine step"):
        device.use(80)
    assert measured.usage()["engine step"].peak == 180
    assert (device.waits, device.resets) == (before[0] + 2, before[1] + 2)


def test_what_runs_beside_keeps_the_peak_that_a_phase_meanwhile_resets(monkeypatch):
    device = Allocator(monkeypatch)
    measured = meter.Meter()
    with measured.phase("load"):
        device.held = 100
        device.use(0)
    before = (device.waits, device.resets)
    with measured.beside("encode"):
        device.use(300)
    assert (device.waits, device.resets) == before
    with measured.beside("encode"):
        device.use(700)
        with measured.phase("swap"):
            device.use(50)
        assert measured.usage()["encode"].peak == 800, "still running"
    with measured.phase("swap"):
        device.use(5000)
    found = {name: (phase.calls, phase.peak) for name, phase in measured.usage().items()}
    assert found == {"load": (1, 100), "encode": (2, 800), "swap": (2, 5100)}


def test_phases_of_two_threads_lose_no_call():
    measured = meter.Meter()
    measured.cuda = False

    def count(phase, name):
        for _ in range(300):
            with phase(name):
                pass

    other = threading.Thread(target=count, args=(measured.beside, "encode"))
    other.start()
    count(measured.phase, "swap")
    count(measured.repeated, "step")
    other.join(30)
    assert {name: phase.calls for name, phase in measured.usage().items()} == {"encode": 300, "step": 300, "swap": 300}


def test_on_a_cpu_a_repeated_phase_takes_its_time_and_no_peak():
    measured = meter.Meter()
    measured.cuda = False
    with measured.repeated("engine step"):
        time.sleep(0.02)
    with pytest.raises(OSError, match="gone"), measured.repeated("engine step"):
        raise OSError("gone")
    with measured.phase("swap"):
        time.sleep(0.01)
    found = measured.usage()
    assert (found["engine step"].calls, found["engine step"].peak) == (2, 0)
    assert 0.02 <= found["engine step"].seconds < 5
    assert found["swap"].seconds >= 0.01
