"""Joining an existing Ray cluster, or starting a local one: addresses, tokens, and which code the actors import.

Invariants: a local run never lands on somebody's cluster (RAY_ADDRESS, a running head); an address where nobody
answers is an error within seconds; actors import the driver's code: the checkout itself on a local Ray, a copy of it,
named by its content, on a cluster. (Ray starts new processes for new content, so no worker keeps an older module.)
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray

from conf.platform import RAY_JOB_VARIABLE, ClusterConfig
from streams.support.files import PROJECT

ANSWER_TIMEOUT_S = 10.0
UPLOAD_EXCLUDES = (".git/", ".venv/", "venv/", "__pycache__/", "/outputs/", "/.*_cache/", "/.hypothesis/")

log = logging.getLogger("sightline.cluster")


def connect(cluster: ClusterConfig, namespace: str, run_root: Path) -> None:
    """ray.init. Raises ConnectionError with what to do."""
    # Ray warns about accelerators that a CPU-only actor hides from itself.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray 2.60 announces that its own token guards the local cluster; nobody has to act on it.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    common: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": cluster.log_to_driver,
        "logging_level": logging.WARNING,
    }
    if not cluster.existing:
        # "local" rather than nothing: Ray would look for a cluster that runs already.
        environment = {"PYTHONPATH": _project_path(), "TOKENIZERS_PARALLELISM": "false"}
        try:
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus or None,
                include_dashboard=False,
                runtime_env={"env_vars": environment},
                **common,
            )
        except Exception as error:  # named boundary: Ray says with a bare Exception that it did not start
            raise RuntimeError(
                f"Ray did not start on this machine: {error} Is there memory, and room in /tmp, and is the machine too busy "
                "(Ray waits 30 s for itself)? Its logs are in /tmp/ray/session_latest/logs; then run the same command again"
            ) from error
        return
    # Ray would warn that it leaves out .git and .venv by itself.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    address = bootstrap_address(cluster.existing)
    check_answers(address)
    try:
        ray.init(address=address, runtime_env=cluster_environment(run_root), **common)
    except ConnectionError as error:
        raise ConnectionError(
            f"cluster.address={cluster.existing}: {error}. If the head is guarded by a token (Ray's default since 2.60), set "
            "RAY_AUTH_MODE=token and the head's token here, too: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error


def bootstrap_address(address: str) -> str:
    """HOST:PORT where the configuration or RAY_ADDRESS says so, else `auto` (Ray looks for a head on this machine)."""
    if address != "auto":
        return address
    named = os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise ConnectionError(
            f"RAY_ADDRESS={named}: the driver has to run on a node of the cluster, so this is not an URL; set it to HOST:PORT "
            "of the head there, or use `ray job submit` from elsewhere"
        )
    return named or "auto"


def check_answers(address: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Raises ConnectionError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"cluster.address={address}: nobody answers there ({error}). Is the head running (`ray status`), is this the "
            "port of `ray start --head --port`, and may this machine reach it?"
        ) from error


def cluster_environment(run_root: Path) -> dict[str, Any]:
    """Ray's runtime_env of the actors on a cluster."""
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if RAY_JOB_VARIABLE in os.environ:
        # The job's own working directory holds; Ray puts it on every process's path.
        return {"env_vars": environment}
    root = PROJECT
    excludes = list(UPLOAD_EXCLUDES)
    if run_root.is_relative_to(root):
        excludes.append(f"/{run_root.relative_to(root)}/")
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = inherited
    return {"env_vars": environment, "working_dir": str(root), "excludes": excludes}


def _project_path() -> str:
    root = str(PROJECT)
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{root}{os.pathsep}{inherited}" if inherited else root
