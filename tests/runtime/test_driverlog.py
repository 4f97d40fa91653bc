"""What the driver says is kept, without secrets and whatever becomes of the terminal; Ctrl-C ends it with one line."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from runtime.tracking import driver_log as driverlog
from runtime.tracking.driver_log import DriverLog, Tee
from tests.support.commands import interrupted, kept
from tests.support.project import ROOT

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from runtime.tracking.driver_log import DriverLog
said = DriverLog()
said.install()
said.outlives_readers = True
logging.basicConfig(format="%(levelname)s %(message)s")
print("before the folder is known")
said.open(Path(sys.argv[1]), "launch.py tracking.uri=http://bob:hunter2@host")
from runtime.tracking.progress import Progress
progress = Progress()
{body}
said.close()
"""
TALK = """progress.say("data: made")
logging.getLogger("sightline").warning("could not reach http://bob:hunter2@host:5000")
warnings.warn("old")
print("error: no\\nsecond line", file=sys.stderr)
for step in range(1, 101):
    progress.step("rl", step, 100, {{"reward": 0.5}})
print("颜色 \\ud800", end="")"""


def run(root, body, *, stdout=subprocess.PIPE, env=None, close=""):
    program = [sys.executable, "-c", PROGRAM.format(body=body.format()), str(root)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {close}', "sh", *program] if close else program,
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": "always"} | (env or {}),
        text=True,
        timeout=120,
        check=False,
    )


def test_everything_that_is_said_is_kept_for_every_attempt_and_without_secrets(tmp_path):
    for _ in range(2):
        done = run(tmp_path, TALK)
        assert done.returncode == 0, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    lines = kept(tmp_path)
    assert "hunter2" not in "".join(lines)
    heads = [i for i, line in enumerate(lines) if line.startswith("=== ")]
    assert len(heads) == 2
    assert heads[0] == 0
    first = lines[: heads[1]]
    assert first[0].endswith("launch.py tracking.uri=http://***@host")
    assert first[1] == "before the folder is known"
    assert any(line.endswith("data: made") for line in first)
    assert "WARNING could not reach http://***@host:5000" in first
    assert any("UserWarning: old" in line for line in first)
    assert first.index("second line") == first.index("error: no") + 1
    assert any("rl 100/100" in line for line in first)
    assert first[-1] == "颜色 \\ud800"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_may_know_any_script_or_none(tmp_path, encoding):
    done = run(tmp_path, TALK, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path)[-1] == "颜色 \\ud800"


def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = run(tmp_path, TALK + "\nprint(end='last words', flush=True)", stdout=write)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path)[-1].endswith("last words")


@pytest.mark.parametrize("close", [">&-", ">/dev/full"])
def test_nor_does_a_terminal_that_is_closed_or_a_full_disk_behind_it(tmp_path, close):
    done = run(tmp_path, TALK, close=close)
    assert done.returncode == 0, done.stderr
    assert any("rl 100/100" in line for line in kept(tmp_path))


def test_a_full_disk_costs_the_file_and_is_said_once(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "driver.log").symlink_to("/dev/full")
    done = run(tmp_path, TALK)
    assert done.returncode == 0, done.stderr
    assert "data: made" in done.stdout
    assert done.stderr.count("driver.log under run_root/logs cannot be written, the run goes on") == 1
    assert "No space left" in done.stderr


def test_so_does_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "logs").write_text("a file")
    done = run(tmp_path, TALK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 1


def test_the_file_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(driverlog, "MAX_BYTES", 2000)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log = DriverLog()
    log.install()
    log.open(tmp_path, "launch.py")
    for i in range(500):
        print(f"line {i}")
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["driver.log", "driver.log.1", "driver.log.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert kept(tmp_path)[-1] == "line 499"


def test_a_line_rewritten_in_place_is_kept_as_it_stood_last_and_now_and_then(tmp_path, monkeypatch):
    log = DriverLog()
    tee = Tee(io.StringIO(), log)
    moments = iter(range(0, 10_000, 10))
    monkeypatch.setattr(driverlog.time, "monotonic", lambda: float(next(moments)))
    for step in range(1, 101):
        tee.write(f"\r\x1b[2Krl {step}/100")
    tee.write("\n")
    lines = list(log._waiting)
    assert lines[-1] == "rl 100/100"
    assert 10 < len(lines) < 60
    assert all(re.fullmatch(r"rl \d+/100", line) for line in lines)


def test_a_command_that_is_no_run_ends_when_its_reader_goes(tmp_path):
    with pytest.raises(BrokenPipeError):
        Tee(_Broken(), DriverLog()).write("x")


class _Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ctrl_c_while_a_run_makes_its_data_is_one_line_that_is_kept(tmp_path):
    status, _, err = interrupted(
        "job=data", f"run_root={tmp_path / 'run'}", "tracking.enabled=false", ready="log budget"
    )
    assert status == 130
    assert err.splitlines() == [
        "stopped by Ctrl-C; the same command with resume=auto starts again what was not finished"
    ]
    assert kept(tmp_path / "run")[-1] == err.strip()
