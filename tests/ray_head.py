"""A Ray cluster of this machine for tests: a head guarded by a token of its own, more nodes, jobs. Ends what it started."""

from __future__ import annotations

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

START_S = 150
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayHead:
    """Use as a context manager. Ports, token and temporary folder are its own: other clusters are not disturbed."""

    def __init__(self, cpus: int) -> None:
        # Short: Ray's socket paths must stay below 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slray", dir="/tmp"))
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
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

    def add_node(self, cpus: int, wrapper: tuple[str, ...] = ()) -> None:
        """wrapper: a command that ends by running its arguments."""
        self._start(f"--address={self.address}", f"--num-cpus={cpus}", wrapper=wrapper)
        self._await_nodes(len(self._processes))

    def run(self, *command: str, cwd: Path, limit_s: float = 120) -> subprocess.CompletedProcess:
        """A command with the token, on this machine, outside of any job."""
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=limit_s)

    def submit(self, folder: Path, *command: str) -> str:
        """`ray job submit` of a folder; returns the job's id."""
        done = subprocess.run(
            [RAY, "job", "submit", "--address", self.url, "--working-dir", str(folder), "--no-wait", "--", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"raysubmit_\w+", done.stdout)[0]

    def jobs(self):
        """A client of the job API, made in a process that may not have the token in its environment otherwise."""
        return _Jobs(self)

    def close(self) -> None:
        """`ray start --block` ends its children on SIGTERM; whatever does not listen is killed with its group."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        log = open(self.folder / f"start-{len(self._processes)}.txt", "w")
        command = [*wrapper, RAY, "start", "--block", "--object-store-memory=200000000", *arguments]
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        self._processes.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        log.close()

    def _await_nodes(self, count: int) -> None:
        deadline = time.monotonic() + START_S
        code = "import json, ray; ray.init(address='auto', logging_level='ERROR'); print(len([n for n in ray.nodes() if n['Alive']]))"
        said = "nothing"
        while time.monotonic() < deadline:
            for i, process in enumerate(self._processes):
                said = (self.folder / f"start-{i}.txt").read_text()
                assert process.poll() is None, f"ray start ended: {said}"
            try:
                with (
                    socket.create_connection(("127.0.0.1", self.port), 1),
                    socket.create_connection(("127.0.0.1", self.dashboard), 1),
                ):
                    done = self.run(sys.executable, "-c", code, cwd=self.folder)
                if done.stdout.strip() == str(count):
                    return
                said = done.stdout + done.stderr
            except OSError:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"Ray did not have {count} nodes within {START_S} s: {said}")


class _Jobs:
    """What the tests ask the job API."""

    def __init__(self, head: RayHead) -> None:
        from urllib.request import Request

        self._request = lambda path: Request(
            f"{head.url}/api/jobs/{path}", headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
        )

    def info(self, job: str) -> dict:
        return self._get(job)

    def logs(self, job: str) -> str:
        return self._get(f"{job}/logs")["logs"]

    def await_status(self, job: str, *wanted: str, limit_s: float) -> dict:
        deadline = time.monotonic() + limit_s
        while (info := self.info(job))["status"] not in wanted:
            assert time.monotonic() < deadline, f"{info['status']} {info['message']}\n{self.logs(job)}"
            time.sleep(0.3)
        return info

    def _get(self, path: str) -> dict:
        from urllib.request import urlopen

        with urlopen(self._request(path), timeout=30) as reply:
            return json.loads(reply.read())
