"""Addresses of clusters, and which code is uploaded."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from runtime.cluster.connect import bootstrap_address, check_answers, cluster_environment
from tests.support.commands import launch
from tests.support.project import ROOT


def test_an_address_where_nobody_answers_is_an_error_within_a_moment():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"cluster\.address={address}: nobody answers there .*ray start --head"):
        check_answers(address)
    assert time.monotonic() - began < 2
    check_answers("auto")


def test_an_address_where_somebody_answers_passes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_answers(f"127.0.0.1:{server.getsockname()[1]}")


def test_auto_is_what_ray_address_names(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert bootstrap_address("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert bootstrap_address("auto") == "head:6379"
    assert bootstrap_address("other:6379") == "other:6379"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS=http://head:8265: .*ray job submit"):
        bootstrap_address("auto")


def test_outside_of_a_job_the_project_is_uploaded_without_what_runs_write(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/own/modules")
    environment = cluster_environment(ROOT / "runs" / "a")
    assert environment["working_dir"] == str(ROOT)
    assert {".git/", ".venv/", "/outputs/", "/runs/a/"} <= set(environment["excludes"])
    assert environment["env_vars"]["PYTHONPATH"] == "/own/modules"
    assert "/elsewhere/" not in str(cluster_environment(Path("/elsewhere/run"))["excludes"])


def test_inside_a_job_its_own_working_directory_holds(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert set(cluster_environment(Path("/run"))) == {"env_vars"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_local_ray_that_does_not_start_is_an_error_in_words(tmp_path):
    too_long = tmp_path / ("x" * 120)  # for the name of a socket
    too_long.mkdir()
    done = launch(f"run_root={tmp_path / 'run'}", limit_s=120, env={"RAY_TMPDIR": str(too_long)})
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray did not start on this machine: ")
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "logs" / "driver-error.txt").read_text()
