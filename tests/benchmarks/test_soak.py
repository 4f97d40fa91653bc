"""benchmarks.soak sees what it looks for: a process or a kind of file that grows, a store that spills, slower steps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import rows
from benchmarks.soak.judging import MIB, Windows, report
from benchmarks.soak.samples import Process, Sample, files_by_kind, kind_of, look, newest_step, role
from tests.support.project import ROOT

STEPS = 1000
ROLES = {"driver": 370, "learner": 700, "GCS": 50}


def sample(step: int, **changes) -> Sample:
    processes = {name: Process(1, size * MIB, 40, 30, 0.1 * step) for name, size in ROLES.items()}
    files = {
        "data": (30, 1000),
        "journals": (1, 1000 * step),
        "checkpoints": (40, 9000 + step),
        "mlflow": (1, 5000 * step),
    }
    sound = Sample(step, processes, 0.4 * step, 0.005, files, (MIB, 0))
    return dataclasses.replace(sound, **changes)


def sampled(change=lambda one: one) -> list[Sample]:
    return [change(sample(step)) for step in range(2, STEPS, 2)]


def steady(_: int) -> float:
    return 0.2


def judged(change=lambda one: one, seconds=steady):
    return report(sampled(change), {step: seconds(step) for step in range(1, STEPS + 1)}, STEPS)


def with_process(one: Sample, name: str, **changes) -> Sample:
    changed = one.processes | {name: dataclasses.replace(one.processes[name], **changes)}
    return dataclasses.replace(one, processes=changed)


def test_a_run_that_stays_as_it_is_passes_with_its_figures():
    found = judged()
    assert found["ok"], found["reasons"]
    assert found["processes"]["driver"]["mib_early"] == found["processes"]["driver"]["mib_late"] == 370
    assert found["step_time"]["wall_ratio"] == 1
    assert found["step_time"]["cpu_s_early"] == pytest.approx(0.3)
    assert found["step_time"]["foreign_cores_late"] == pytest.approx(0.5)
    assert found["compared_steps"] == {"early": (200, 400), "late": (800, 1000)}


GROWN = {
    "a driver that keeps 40 KiB a step": lambda one: with_process(
        one, "driver", memory=370 * MIB + one.step * 40 * 1024
    ),
    "a small process that more than doubles": lambda one: with_process(one, "GCS", memory=50 * MIB + one.step * 2**16),
    "files that stay open": lambda one: with_process(one, "learner", files=40 + one.step // 50),
    "threads that do not end": lambda one: with_process(one, "learner", threads=30 + one.step // 50),
    "a second process in one role": lambda one: with_process(one, "GCS", count=1 + (one.step > 500)),
    "an actor that is gone": lambda one: dataclasses.replace(
        one, processes={name: p for name, p in one.processes.items() if name != "learner" or one.step < 500}
    ),
    "data that grow": lambda one: dataclasses.replace(one, files=one.files | {"data": (30, 1000 + one.step)}),
    "a new kind of file": lambda one: dataclasses.replace(one, files=one.files | {"other": (one.step // 100, 1)}),
    "checkpoints that are not deleted": lambda one: dataclasses.replace(
        one, files=one.files | {"checkpoints": (one.step // 2, 1)}
    ),
    "objects that stay in the store": lambda one: dataclasses.replace(one, store=(one.step * 2**16, 0)),
    "objects that are spilled": lambda one: dataclasses.replace(one, store=(MIB, 10 * MIB if one.step > 900 else 0)),
}


@pytest.mark.parametrize("what", GROWN)
def test_what_grows_is_seen(what):
    found = judged(GROWN[what])
    assert not found["ok"]
    assert len(found["reasons"]) == 1, found["reasons"]


def test_logs_journals_the_database_and_the_warm_up_may_grow():
    def warming(one: Sample) -> Sample:
        logs = dataclasses.replace(one, files=one.files | {"logs": (4, one.step * 100)})
        return with_process(logs, "learner", memory=(300 + min(one.step, 200) * 2) * MIB)

    assert judged(warming)["reasons"] == []


def test_growth_within_five_percent_or_the_floor_passes():
    found = judged(lambda one: with_process(one, "GCS", memory=50 * MIB + one.step * 8 * 1024))
    assert found["reasons"] == []
    assert found["processes"]["GCS"]["kib_per_step"] == pytest.approx(8, rel=0.2)


def test_steps_that_get_slower_are_seen_unless_the_whole_machine_does():
    def slower(step: int) -> float:
        return 0.2 if step < 600 else 0.23

    (reason,) = judged(seconds=slower)["reasons"]
    assert "1.150 times as long" in reason

    def disturbed(one: Sample, others: float = 1.0) -> Sample:
        late = max(0, one.step - 600)
        return dataclasses.replace(one, yardstick_s=slower(one.step) / 40, busy_s=one.busy_s + others * 0.2 * late)

    found = judged(disturbed, slower)
    assert found["ok"]
    assert "measure on a quiet machine" in found["notes"][0]
    # A run that takes more of the machine itself slows other work down, too.
    assert not judged(lambda one: disturbed(one, others=0.0), slower)["ok"]
    assert not judged(lambda one: dataclasses.replace(disturbed(one), yardstick_s=0.005), slower)["ok"]


def test_a_run_that_ended_early_or_was_not_looked_at_passes_nothing():
    assert not report(sampled(), dict.fromkeys(range(1, 900), 0.2), STEPS)["ok"]
    assert not report([], dict.fromkeys(range(1, STEPS + 1), 0.2), STEPS)["ok"]


@pytest.mark.parametrize(
    ("steps", "early", "late"),
    [(2000, (200, 400), (1800, 2000)), (300, (100, 200), (200, 300)), (30, (10, 20), (20, 30))],
)
def test_short_runs_are_compared_in_thirds(steps, early, late):
    assert Windows.of(steps) == Windows(early, late)


def test_processes_and_files_are_told_apart(tmp_path):
    lines = {
        "python launch.py job=rl": "driver",
        "/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/s": "raylet",
        "ray::rollout-1.rollout()": "rollout-1",
        "ray::learner": "learner",
        "ray::IDLE": "task worker",
        "ray::_commit": "task worker",
        "python -P -m streams.video.decode 46": "decode",
        "bash": "",
    }
    assert {line: role(line) for line in lines} == lines
    kinds = {
        "stages/rl.steps.jsonl": "journals",
        "stages/rl.json": "manifests",
        "mlflow.db-wal": "mlflow",
        "checkpoints/rl/step000002/hf/config.json": "checkpoints",
        "checkpoints/rl/step000004.partial/hf/config.json": "being written",
        ".lock": "other",
    }
    assert {path: kind_of(Path(path)) for path in kinds} == kinds
    for path in kinds:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("four")
    assert files_by_kind(tmp_path) == dict.fromkeys(kinds.values(), (1, 4))


def test_the_newest_step_is_read_from_the_end_of_a_journal(tmp_path):
    journal = tmp_path / "rl.steps.jsonl"
    assert newest_step(journal) == 0
    lines = [json.dumps({"step": step, "kind": "step", "values": {"x": 1.0}}) for step in range(1, 999)]
    lines.append(json.dumps({"step": 2000, "kind": "eval", "values": {}}))
    journal.write_text("\n".join(lines) + '\n{"step": 99')
    assert newest_step(journal) == 998


def test_a_look_sees_memory_files_and_threads_of_a_process_and_its_children(tmp_path):
    code = "held = bytearray(64 * 2**20); files = [open('/dev/null') for _ in range(9)]; print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}  # launch.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline()
        found = look(os.getpid(), tmp_path, 7).processes["driver"]
        assert found.memory > 64 * MIB
        assert found.files >= 12
        assert found.threads >= 1
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_real_run_is_sampled_to_its_end(tmp_path):
    target = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--steps", "60", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert target.is_file(), done.stderr
    found = json.loads(target.read_text())
    assert found["steps"] == 60, done.stderr
    # So short a run may not have come to rest: its status must say what the report does.
    assert done.returncode == (0 if found["ok"] else 1), done.stderr
    expected = {"driver", "learner", "rollout-0", "rollout-1", "scorer", "GCS", "raylet", "decode"}
    assert expected <= found["processes"].keys()
    assert all(found["processes"][name]["mib_late"] > 1 for name in expected)
    assert found["files"]["checkpoints"]["number_late"] > 0
    assert found["object_store"]["pinned_mib_late"] is not None
    assert found["step_time"]["wall_s_late"] > 0


def test_the_rows_that_are_written_can_all_be_read(tmp_path, capsys):
    rows.write(tmp_path / "rows.jsonl", 50)
    assert rows.main(["--read", str(tmp_path / "rows.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 50
    assert found["peak_mib"] > 0
    with pytest.raises(SystemExit):
        rows.main(["--rows", "1000"])
    assert "what is bounded is not full yet" in capsys.readouterr().err
