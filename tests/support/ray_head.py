"""A Ray cluster of this machine for tests: a head guarded by a token of its own, more nodes, jobs. Ends what it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

from tests.support.processes import family

START_S = 150
BIN = Path(sys.executable).parent
"""Where `ray` and `python` of the nodes are, unless told otherwise."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayHead:
    """Use as a context manager. Ports, token and temporary folder are its own: other clusters are not disturbed."""

    def __init__(self, cpus: int, bin: Path = BIN) -> None:
        """bin: the folder of the environment's commands that head and jobs run in."""
        self._ray, self._python = str(bin / "ray"), str(bin / "python")
        # Short: Ray's socket paths must stay below 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slray", dir="/tmp"))
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self._processes: list[subprocess.Popen] = []
        self._start(
            *("--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}"),
            *(f"--num-cpus={cpus}", f"--temp-dir={self.folder}"),
        )

    def __enter__(self) -> RayHead:
        try:
            self._await_nodes(1)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def joining(self) -> dict[str, str]:
        """The environment of a command that joins the cluster, with the token."""
        return self.environment | {"RAY_ADDRESS": self.address}

    @property
    def nodes(self) -> list[int]:
        """The process that each node descends from, the head's first."""
        return [process.pid for process in self._processes]

    def add_node(self, cpus: int, wrapper: tuple[str, ...] = ()) -> None:
        """wrapper: a command that ends by running its arguments."""
        # A folder of its own, as on another machine: nodes unpack the code that they are sent afresh, one over the other's.
        folder = self.folder / f"n{len(self._processes)}"
        self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--temp-dir={folder}", wrapper=wrapper)
        self._await_nodes(len(self._processes))

    def lose_node(self, process: int) -> None:
        """Kill a node of `nodes`, with all that runs on it."""
        for pid in family(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (lost,) = [known for known in self._processes if known.pid == process]
        self._processes.remove(lost)
        lost.wait()

    def run(self, *command: str, cwd: Path, limit_s: float = 120) -> subprocess.CompletedProcess:
        """Run a command with the token, on this machine, outside of any job."""
        return subprocess.run(command, cwd=cwd, env=self.joining, capture_output=True, text=True, timeout=limit_s)

    def submit(self, folder: Path, *command: str) -> str:
        """Submit a folder with `ray job submit`; return the job's id."""
        done = subprocess.run(
            [
                self._ray,
                "job",
                "submit",
                "--address",
                self.url,
                "--working-dir",
                str(folder),
                "--no-wait",
                "--",
                *command,
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"raysubmit_\w+", done.stdout)[0]

    def jobs(self) -> Jobs:
        return Jobs(self.url, self.environment["RAY_AUTH_TOKEN"])

    def close(self) -> None:
        """End the cluster: `ray start --block` ends its children on SIGTERM; what does not react is killed with its group."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        command = [*wrapper, self._ray, "start", "--block", "--object-store-memory=200000000", *arguments]
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        with open(self.folder / f"start-{len(self._processes)}.txt", "w") as log:
            self._processes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _await_nodes(self, count: int) -> None:
        """Wait until that many nodes are alive and the dashboard answers."""
        deadline = time.monotonic() + START_S
        while not (self._answers() and self._alive() == count):
            said = "".join((self.folder / f"start-{i}.txt").read_text() for i in range(len(self._processes)))
            assert all(process.poll() is None for process in self._processes), f"ray start ended: {said}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"Ray did not have {count} nodes within {START_S} s: {said}")
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            for port in (self.port, self.dashboard):
                socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def _alive(self) -> int:
        code = (
            "import ray; ray.init(address='auto', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        )
        done = self.run(self._python, "-c", code, cwd=self.folder)
        return int(done.stdout) if done.returncode == 0 else 0


class Jobs:
    """What the tests ask the job API."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token

    def info(self, job: str) -> dict:
        return self._get(job)

    def logs(self, job: str) -> str:
        return self._get(f"{job}/logs")["logs"]

    def await_status(self, job: str, wanted: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while (info := self.info(job))["status"] != wanted:
            ended = info["status"] in ("FAILED", "SUCCEEDED", "STOPPED")
            said = f"{info['status']}, not {wanted}: {info['message']}"
            assert not ended, f"{said}\n{self.logs(job)}"
            assert time.monotonic() < deadline, f"{said}\n{self.logs(job)}"
            time.sleep(0.3)

    def _get(self, path: str) -> dict:
        request = Request(f"{self._url}/api/jobs/{path}", headers={"Authorization": f"Bearer {self._token}"})
        with urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())
