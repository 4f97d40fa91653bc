"""What one node of the cluster sees: a small task that runs there before any actor with weights starts.

Invariants:
* it imports only the standard library and `streams.support`, so it replies at once, even where torch is missing;
* it never raises: whatever it finds is in the report;
* everything it writes is in the preflight's own folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from streams.support.files import PACKAGES as OUR_PACKAGES

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "numpy")
"""Packages that must have the same version on every node, as must Python and this project's own code."""
SHARED_WAIT_S = 5.0
"""Seconds to wait for a file of another node: a network file system may show a new file late."""
SHARED_POLL_S = 0.1


@dataclass(frozen=True)
class NeededPath:
    """A file or folder that every node must see as the driver does. stamp: see `stamp`."""

    key: str
    path: str
    stamp: str


@dataclass(frozen=True)
class ProbeRequest:
    """folder: the preflight's own, below run_root; it holds DRIVER_FILE with `nonce` in it, `wait_s` later at most."""

    folder: str
    nonce: str
    needed: tuple[NeededPath, ...] = ()
    wait_s: float = SHARED_WAIT_S


@dataclass(frozen=True)
class NodeReport:
    """node: as messages call it. shared: what is wrong with run_root there, empty if nothing. missing: (key, what)."""

    node: str
    versions: dict[str, str]
    code: str
    code_path: str
    shared: str = ""
    missing: tuple[tuple[str, str], ...] = field(default=())


DRIVER_FILE = "driver"


def probe(node: str, request: ProbeRequest) -> NodeReport:
    """Return the report of the machine that this runs on."""
    code, code_path = own_code()
    return NodeReport(
        node=node,
        versions=installed_versions(),
        code=code,
        code_path=code_path,
        shared=_check_shared(request, node),
        missing=tuple((need.key, problem) for need in request.needed if (problem := _check_needed(need))),
    )


def installed_versions() -> dict[str, str]:
    """Return versions by package, from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def own_code() -> tuple[str, str]:
    """Return the digest of this project's packages as they would be imported here, and the folders they are in.

    On a cluster each package may lie in a folder of its own: Ray unpacks what it was sent one by one.
    """
    folders = {}
    for package in OUR_PACKAGES:
        found = find_spec(package)
        if found is not None and found.submodule_search_locations:
            folders[package] = Path(next(iter(found.submodule_search_locations)))
    return code_digest(folders), ", ".join(dict.fromkeys(str(folder.parent) for folder in folders.values()))


def code_digest(folders: Mapping[str, Path]) -> str:
    """Return one digest of all Python files. folders: package name -> its folder."""
    digest = hashlib.sha256()
    for package, folder in sorted(folders.items()):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def stamp(path: str) -> str:
    """Return what distinguishes versions of a file, or of a folder's files: names and sizes. Raises OSError."""
    if os.path.isdir(path):
        files = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path) if entry.is_file())
        return f"folder of {len(files)} files, {hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"
    return f"{os.path.getsize(path)} bytes"


def reply_file(node: str) -> str:
    """Return the name of the file that a node leaves in the preflight's folder."""
    return hashlib.sha256(node.encode()).hexdigest()[:16]


def await_content(path: Path, wanted: str, wait_s: float = SHARED_WAIT_S) -> str:
    """Wait until `path` contains `wanted`. Returns '' then, or after `wait_s` seconds what was found instead."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            found = path.read_text()
            if found == wanted:
                return ""
            problem = "it holds something else"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > deadline:
            return problem
        time.sleep(SHARED_POLL_S)


def _check_shared(request: ProbeRequest, node: str) -> str:
    """Read what the driver wrote, write what the driver will read."""
    folder = Path(request.folder)
    root = folder.parent
    if problem := await_content(folder / DRIVER_FILE, request.nonce, request.wait_s):
        if not root.is_dir():
            return f"there is no folder {root} there"
        return f"{root} there is not the driver's: a file that the driver just wrote is not in it ({problem})"
    try:
        (folder / reply_file(node)).write_text(request.nonce)
    except OSError as error:
        return f"{root} cannot be written there: {error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
    return ""


def _check_needed(need: NeededPath) -> str:
    try:
        found = stamp(need.path)
        if found != need.stamp:
            return f"{need.path} differs from the driver's ({found} there, {need.stamp} on the driver)"
        if os.path.isfile(need.path):
            with open(need.path, "rb") as file:
                file.read(1)
    except OSError as error:
        return f"{need.path}: {error.strerror or error} on {socket.gethostname()}"
    return ""
