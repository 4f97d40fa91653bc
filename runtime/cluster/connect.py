"""Joining an existing Ray cluster, or starting a local one: addresses and tokens.

Invariants:
* A local run never lands on somebody's cluster (RAY_ADDRESS, a running head).
* An address where nobody answers is an error within seconds.
* Actors import the driver's code: see `runtime.cluster.code`.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RuntimeEnvSetupError

from conf.platform import ClusterConfig
from runtime.cluster.code import cluster_environment, local_path, modules_folder
from runtime.recovery import reaper
from runtime.recovery.lifeline import NATIVE_VARIABLE
from streams.support.files import MODULES_VARIABLE

ANSWER_TIMEOUT_S = 10.0
LOCAL_NATIVE_S = "120"
TASKS_KEPT = 1000
"""Finished tasks that a local Ray's head remembers."""

log = logging.getLogger("sightline.cluster")


def connect(cluster: ClusterConfig, namespace: str, run_root: Path) -> None:
    """Join the configured cluster, or start a local Ray.

    Raises RuntimeError if Ray does not start here, ConnectionError if the cluster cannot be joined, ValueError if the
    actors' code cannot be sent. Each message says what to do.
    """
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
        # Ray would start a process per core that no actor can use, as actors bring an environment of their own.
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # Time for the last checkpoint, if this Ray loses its GCS.
        os.environ.setdefault(NATIVE_VARIABLE, LOCAL_NATIVE_S)
        # The head keeps what became of the last tasks for Ray's dashboard, which a local run has not; by default 100,000.
        os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", str(TASKS_KEPT))
        # "local" rather than nothing: Ray would look for a cluster that runs already.
        environment = {"PYTHONPATH": local_path(), "TOKENIZERS_PARALLELISM": "false"}
        try:
            started = ray.init(
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
        reaper.start(started.address_info["session_dir"])  # type: ignore[attr-defined]
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
    except RuntimeEnvSetupError as error:
        raise ValueError(
            f"{MODULES_VARIABLE}={modules_folder()}, the folder of your own modules, cannot be sent to the cluster: {error}. "
            "Keep your modules in a folder without data, or name in its .gitignore what need not be sent"
        ) from error


def bootstrap_address(address: str) -> str:
    """Return the cluster's address: HOST:PORT of the config or RAY_ADDRESS, else `auto` (Ray looks on this machine).

    Raises ConnectionError for a RAY_ADDRESS that is a URL.
    """
    if address != "auto":
        return address
    named = os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise ConnectionError(
            f"RAY_ADDRESS={named}: the driver has to run on a node of the cluster, so this must not be a URL; set it to "
            "HOST:PORT of the head there, or use `ray job submit` from elsewhere"
        )
    return named or "auto"


def check_answers(address: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Raise ConnectionError if nobody listens at HOST:PORT. Ray itself would try for minutes."""
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
