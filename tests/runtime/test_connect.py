"""Addresses of clusters, and which code is uploaded."""

from __future__ import annotations

import importlib
import socket
import sys
import time
from pathlib import Path

import pytest

from runtime.cluster.code import cluster_environment, local_path
from runtime.cluster.connect import bootstrap_address, check_answers
from streams.support.files import MODULES_VARIABLE, PACKAGES, PROJECT
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


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    """A user's folder, as the `sightline` command names it; a module of it has been imported."""
    monkeypatch.setenv(MODULES_VARIABLE, str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "own_sent_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_sent_module")
    yield tmp_path
    sys.modules.pop("own_sent_module", None)


def test_the_command_sends_the_packages_and_the_users_folder_only_if_it_is_used(own_folder):
    environment = cluster_environment(own_folder / "runs" / "a")
    assert [Path(sent) for sent in environment["py_modules"]] == [PROJECT / package for package in PACKAGES]
    assert environment["working_dir"] == str(own_folder)
    assert {"site-packages/", "/runs/a/"} <= set(environment["excludes"])
    sys.modules.pop("own_sent_module")
    assert set(cluster_environment(Path("/run"))) == {"env_vars", "py_modules", "excludes"}


def test_inside_a_job_the_command_sends_the_packages_alone(own_folder, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert set(cluster_environment(Path("/run"))) == {"env_vars", "py_modules", "excludes"}


def test_a_run_root_whose_name_would_leave_out_a_part_of_ours_is_refused(own_folder):
    with pytest.raises(ValueError, match=r"run_root=data, .*\(streams/data\).*outputs/data"):
        cluster_environment(own_folder / "data")


def test_on_this_machine_our_packages_come_first_then_the_users_modules(own_folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/more")
    assert local_path() == f"{PROJECT}:{own_folder}:/more"
    monkeypatch.delenv(MODULES_VARIABLE)
    assert local_path() == f"{PROJECT}:/more"


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
