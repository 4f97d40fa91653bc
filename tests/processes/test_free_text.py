"""A small real run on rows with awkward categories, against a real MLflow server whose address holds a password.

Its reward is always 0, has a key, and shows it where it can. What must hold: every category has a chart of its own, the best
checkpoint is kept by one of them, no password, key or token is anywhere, and the run says that it learns nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from streams.data.synthetic.questions import SyntheticConfig, generate
from tests.support.commands import kept, launch
from tests.support.project import ROOT
from tests.support.small_run import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CATEGORIES = ("a//b", "颜色", "形状", "../..", "e\u0301", "é", "📷?", "x" * 260, "x" * 261, "\x1b[2J", "all", "")
BEST = "a//b"
SENTINEL = "S3cretSentinel"
PASSWORD = f"{SENTINEL}0"
TOKENS = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN")
ENVIRONMENT = {name: f"{name.lower()}-{SENTINEL}" for name in TOKENS}
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address with user and password, the server's store)."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    words = [f"--backend-store-uri=sqlite:///{folder / 'm.db'}", f"--artifacts-destination={folder / 'artifacts'}"]
    command = [str(Path(sys.executable).parent / "mlflow"), "server", *words, f"--port={port}", "--workers=1"]
    # Without its runners of background jobs, which are as many processes more.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, env=environment)
    try:
        until = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < until, (folder / "said").read_text()
                time.sleep(0.5)
        yield f"http://bob:{PASSWORD}@127.0.0.1:{port}", folder / "m.db"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def done(server, tmp_path_factory):
    """(run_root, what the run printed)."""
    folder = tmp_path_factory.mktemp("free")
    generate(folder, SyntheticConfig(train_clips=3, heldout_per_mode=len(CATEGORIES) // 3, max_turns=12))
    for split in ("train", "heldout"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row, category in zip(rows, CATEGORIES * 9, strict=False):
            row["category"] = category
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_root = folder / "run"
    words = [word for word in SETTINGS if not word.startswith(("sft.", "learner.freeze_names", "checkpoint."))]
    finished = launch(
        *words,
        "job=rl",
        f"data.train={folder / 'train.jsonl'}",
        f"data.heldout={folder / 'heldout.jsonl'}",
        f"run_root={run_root}",
        f"tracking.uri={server[0]}",
        "reward=accuracy",
        f"+reward.terms.total={{target: 'tests.support.zero_reward:Nothing', api_key: {SENTINEL}}}",
        "eval.every=2",
        f"eval.best=accuracy_{BEST}",
        "monitor.idle_steps=2",
        "rollout.workers=1",
        env=ENVIRONMENT,
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return run_root, finished.stdout + finished.stderr


def metrics(root: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (root / "stages" / "rl.steps.jsonl").read_text().splitlines()]
    return [line["values"] for line in lines if line["kind"] == kind]


def test_every_category_has_a_chart_of_its_own_on_the_server(server, done):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server[0])
    (run,) = client.search_runs([client.get_experiment_by_name("sightline").experiment_id])
    assert run.info.status == "FINISHED"
    charted = {name for name in run.data.metrics if name.startswith("eval/accuracy_")}
    assert len(charted) == len(CATEGORIES) + 1, "and the mean"
    assert {"eval/accuracy_颜色", "eval/accuracy_形状", "eval/accuracy_a_x002F_/b", "eval/accuracy_all"} <= charted
    for values in metrics(done[0], "eval"):
        assert charted == {name for name in values if name.startswith("eval/accuracy_")}
    # A term that is called like our own metric stands beside it.
    assert {"reward/total", "reward/total-term"} <= set(run.data.metrics)
    assert "tracking" not in done[1].lower()


def test_the_best_checkpoint_is_kept_by_such_a_name(done):
    kept_as_best = json.loads((done[0] / "checkpoints" / "rl" / "best" / "best.json").read_text())
    assert kept_as_best["metric"] == "accuracy_a_x002F_/b"
    assert kept_as_best["value"] == max(v["eval/accuracy_a_x002F_/b"] for v in metrics(done[0], "eval"))


def test_a_stage_that_learns_nothing_says_so_and_goes_on(done):
    root, said = done
    notices = [line for line in said.splitlines() if "nothing is learned" in line]
    assert len(notices) == 2, "after 2 steps and after 4"
    assert "every reward of the last 2 steps is 0" in notices[0]
    assert "total 0" in notices[0]
    assert [values["reward/zero_std_groups"] for values in metrics(root, "step")] == [1.0] * 4
    assert sum("nothing is learned" in line for line in kept(root)) == 2


def test_the_password_connects_and_is_kept_nowhere_nor_is_a_key_or_a_token(server, done):
    root, said = done
    assert SENTINEL not in said
    assert "401 for https://***@judge.example/x with ***" in said, "the reward did show its own"
    skipped = json.loads((root / "stages" / "rl.json").read_text())["result"]["skipped"]
    assert any("401 for https://***@judge.example/x with ***" in sample["reason"] for sample in skipped)
    assert "401 for https://***@judge.example/x with ***" in (root / "logs" / "scorer.log").read_text()
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"tracking.json", "driver.log", "rl.json"} <= {path.name for path in files}
    files += [path for path in server[1].parent.rglob("*") if path.is_file()]
    assert [path for path in files if SENTINEL.encode() in path.read_bytes()] == []
    note = json.loads((root / "tracking.json").read_text())
    assert note["uri"] == server[0].replace(f"bob:{PASSWORD}", "***")


def test_what_ends_before_a_run_keeps_its_words_where_there_is_a_run_root_and_hides_the_password(server, done):
    root, _ = done
    wrong = launch(f"run_root={root}", f"tracking.uri={server[0]}", "tracking.experiment=' '", limit_s=120)
    assert wrong.returncode == 2
    lines = kept(root)
    assert lines[-1].startswith("configuration error: ")
    assert "***@127.0.0.1" in lines[-2], "the command"
    assert PASSWORD not in "".join(lines) + wrong.stderr
    shown = subprocess.run(
        [sys.executable, "launch.py", "--cfg", "job", f"tracking.uri={server[0]}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "uri: http://***@127.0.0.1" in shown.stdout
    assert PASSWORD not in shown.stdout + shown.stderr


def test_another_attempt_goes_on_in_the_same_mlflow_run_whatever_the_password_is_now(server, tmp_path):
    from conf.schema import TrackingConfig
    from runtime.tracking.tracker import Tracker

    ids = set()
    for user in ("bob:other", "alice:third", f"bob:{PASSWORD}"):
        address = server[0].replace(f"bob:{PASSWORD}", user)
        tracker = Tracker(TrackingConfig(uri=address, experiment="again"), tmp_path, "rl-seed0", resume=True)
        tracker.metrics({"train/loss": 1.0}, step=len(ids))
        tracker.close()
        assert tracker.failed is None
        ids.add(tracker.run_id)
    assert len(ids) == 1
