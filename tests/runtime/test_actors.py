"""Actors by name: their logs, their process titles, and what is said when one crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from conf.schema import ClusterConfig, RunConfig
from rewards.compose import RewardConfig
from rollout.config import RolloutConfig
from runtime.cluster.actors import ActorBook, named_class, run_id, short_name, tail
from runtime.cluster.session import Session
from streams.memory import MemoryConfig
from tests.support.project import ROOT


def test_names_are_short_and_runs_never_share_one(tmp_path):
    names = [short_name(name) for name in ("learner", "learner rank 3", "rollout worker 12", "scorer", "scorer 3")]
    assert names == ["learner", "learner-3", "rollout-12", "scorer", "scorer-3"]
    assert run_id(tmp_path / "my run").startswith("my_run-")
    assert run_id(tmp_path / "a").endswith(f"-{os.getpid()}")


def test_the_named_class_is_the_actor_under_another_name():
    class Actor:
        def call(self):
            return 1

    named = named_class(Actor, "rollout-0")
    assert named.__name__ == "rollout-0"
    assert issubclass(named, Actor)
    assert named().call() == 1


def test_the_end_of_a_log_is_quoted_and_a_missing_one_is_not(tmp_path):
    assert tail(tmp_path / "none.log") == ""
    (tmp_path / "a.log").write_text("\n".join(f"line {i}" for i in range(10_000)))
    said = tail(tmp_path / "a.log")
    assert str(tmp_path / "a.log") in said
    assert said.endswith("line 9998\n  line 9999")
    assert len(said.splitlines()) < 20


def test_a_crash_is_quoted_from_its_beginning_and_an_earlier_attempts_crash_is_not(tmp_path):
    crash = "\n".join(["Fatal Python error: Segmentation fault", *(f"  File {i}" for i in range(50)), "modules " * 99])
    log = tmp_path / "a.log"
    log.write_text(f"a starts: host h\n{crash}\n")
    said = tail(log).splitlines()
    assert said[2] == "  Fatal Python error: Segmentation fault"
    assert len(said) < 20
    log.write_text(f"a starts: host h\n{crash}\na starts: host h\nloaded\n")
    assert tail(log).endswith("which ends:\n  a starts: host h\n  loaded")


def test_a_reward_that_was_stuck_is_named_with_its_line(tmp_path):
    frames = ("/usr/lib/re.py", "/home/me/mine.py", "/opt/rewards/compose.py", "/opt/rewards/scorer.py")
    stack = "\n".join(f'  File "{file}", line {i} in f{i}' for i, file in enumerate(frames))
    for report in ("Timeout (0:00:04)!", "Fatal Python error: Segmentation fault"):
        text = f"scorer starts: host h\n{report}\nThread 0x1 (most recent call first):\n{stack}\n"
        (tmp_path / "scorer.log").write_text(text)
        book = ActorBook("run", tmp_path)
        book.add("scorer", SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "abc")))
        error = ActorDiedError()
        error.actor_id = "abc"
        first, _, shown, *_ = book.explain(error).splitlines()
        assert first.endswith(" It was in f1, /home/me/mine.py:1.")
        assert ("could not be interrupted" in first) == report.startswith("Timeout")
        assert shown == f"  {report}"
        (tmp_path / "scorer.log").write_text(f"{text}scorer starts: host h\n")
        assert "mine.py" not in book.explain(error), "another process has written that"


def test_an_error_without_any_detail_is_still_explained(tmp_path):
    said = ActorBook("run", tmp_path).explain(ActorDiedError())
    assert said == "an actor died: The actor died unexpectedly before finishing this task."
    assert "odd" in ActorBook("run", tmp_path).explain(RayActorError(error_msg="odd"))


LOGGING = """
import logging, sys, threading, warnings
from streams.support.actor_log import MAX_BYTES, open_actor_log
path = open_actor_log()
logging.getLogger("sightline.rollout").info("loaded")
warnings.warn("careful")
thread = threading.Thread(target=lambda: 1 / 0, name="engine")
thread.start(); thread.join()
if sys.argv[1] == "rotate":
    for _ in range(20):
        logging.getLogger("sightline").info("x" * (MAX_BYTES // 10))
if sys.argv[1] != "raise":
    import ctypes; ctypes.string_at(0)
raise RuntimeError("the end")
"""


@pytest.mark.parametrize("how", ["raise", "crash", "rotate"])
def test_an_actors_log_holds_records_warnings_thread_errors_and_how_it_ended(tmp_path, how):
    environment = {**os.environ, "SIGHTLINE_ACTOR": "rollout-0", "SIGHTLINE_LOG_DIR": str(tmp_path / "logs")}
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, how], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    text = (tmp_path / "logs" / "rollout-0.log").read_text()
    if how == "rotate":
        assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == [f"rollout-0.log{n}" for n in ("", ".1", ".2")]
    else:
        for part in ("rollout-0 starts: host ", ", pid ", "sightline.rollout: loaded", "careful"):
            assert part in text
        assert "uncaught in thread engine" in text
        assert "ZeroDivisionError" in text
    if how == "raise":
        assert "RuntimeError: the end" in text
    else:
        assert done.returncode == -signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in text


def test_a_folder_that_cannot_be_written_costs_the_log_not_the_actor(tmp_path):
    (tmp_path / "file").touch()
    code = "from streams.support.actor_log import open_actor_log; print(open_actor_log())"
    environment = {**os.environ, "SIGHTLINE_ACTOR": "scorer", "SIGHTLINE_LOG_DIR": str(tmp_path / "file" / "logs")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "scorer: no log in " in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_crashed_actor_is_reported_with_name_place_cause_and_log(tmp_path):
    config = RunConfig(
        run_root=str(tmp_path / "run"),
        memory=MemoryConfig("full"),
        rollout=RolloutConfig(workers=1),
        reward=RewardConfig(terms={"correctness": {}}),
        cluster=ClusterConfig(num_cpus=2),
    )
    with Session(config) as session:
        pids = session.wait_ready()
        worker = pids["rollout worker 0"]
        for actor, pid in (("learner", pids["learner"]), ("rollout-0", worker), ("scorer", pids["scorer"])):
            assert actor.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(worker, signal.SIGSEGV)
        with pytest.raises(RuntimeError) as died:
            session.call(session.crew.places.workers[0].pid.remote(), "its pid")
    said = str(died.value)
    assert "an actor died while the run waited for its pid: rollout-0 died (node " in said
    assert f"pid {worker})" in said
    log = tmp_path / "run" / "logs" / "rollout-0.log"
    assert f"its log is {log}, which ends:" in said
    assert "Fatal Python error: Segmentation fault" in said
