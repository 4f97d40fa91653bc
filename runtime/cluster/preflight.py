"""What must hold on every node of a cluster, asked before any actor with weights starts.

Invariants:
* all problems are reported at once, each with its node and what to do;
* every wait has a timeout and names the node;
* the functions that judge are pure; `runtime.cluster.nodes` collects what they judge;
* nothing is left behind in run_root.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from conf.data import DataConfig
from conf.schema import RunConfig
from runtime.cluster.nodes import (
    DRIVER_FILE,
    NeededPath,
    NodeReport,
    ProbeRequest,
    await_content,
    installed_versions,
    own_code,
    probe,
    reply_file,
    stamp,
)
from runtime.planning.object_store import NodeStore
from runtime.starting_point import named_checkpoints
from streams.checkpoint.folder import is_hub_id
from streams.data.dataset import sample_tasks

SAMPLED_VIDEOS = 16
SHOWN_PATHS = 3

log = logging.getLogger("sightline.preflight")


class PreflightError(ValueError):
    """The cluster cannot run this; the message lists every problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(self.problems, start=1))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"the cluster is not ready for this run, {count}:{lines}")


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Node:
    """A live node as Ray lists it. name: as messages call it."""

    id: str
    name: str
    cpus: float
    gpus: float

    def holds(self, bundle: Bundle) -> bool:
        return bundle.cpus <= self.cpus + 1e-9 and bundle.gpus <= self.gpus + 1e-9


# ---- pure: judging -------------------------------------------------------------------------------------------


def check_resources(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[str]:
    """Return why the actors do not fit: in sum, each on some node, or all together; [] if they do."""
    problems = []
    for kind in ("CPU", "GPU"):
        need = sum(_amount(b, kind) for b in bundles)
        have = sum(node.cpus if kind == "CPU" else node.gpus for node in nodes)
        if need > have + 1e-9:
            parts = " + ".join(f"{b.name} {_amount(b, kind):g}" for b in bundles)
            problems.append(
                f"the actors need {need:g} {kind}s ({parts}) but the cluster has {have:g}: lower rollout.workers, "
                "learner.ranks or cluster.actor_cpus, or bring a larger cluster"
            )
    homeless = [b for b in bundles if not any(node.holds(b) for node in nodes)]
    if homeless:
        first = homeless[0]
        problems.append(
            f"no single node has what {_listed([b.name for b in homeless])} needs ({first.cpus:g} CPUs and {first.gpus:g} "
            f"GPUs; {_sizes(nodes)}): lower cluster.actor_cpus or bring a larger node"
        )
    if problems:
        return problems
    left = unplaced(bundles, nodes)
    if left:
        problems.append(
            f"the nodes have enough in sum, but each actor must lie on one node and no room is left for "
            f"{_listed([b.name for b in left])} ({_sizes(nodes)}): lower cluster.actor_cpus or rollout.workers"
        )
    return problems


def unplaced(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[Bundle]:
    """Return the bundles left over after placing the largest first, each where it leaves the least room."""
    free = [[node.gpus, node.cpus] for node in nodes]
    left = []
    for bundle in sorted(bundles, key=lambda b: (-b.gpus, -b.cpus)):
        fitting = [f for f in free if f[0] >= bundle.gpus - 1e-9 and f[1] >= bundle.cpus - 1e-9]
        if not fitting:
            left.append(bundle)
            continue
        chosen = min(fitting)
        chosen[0] -= bundle.gpus
        chosen[1] -= bundle.cpus
    return left


def check_nodes(reports: Sequence[NodeReport], driver: NodeReport) -> list[str]:
    """Return how nodes differ from the driver. The same problem of several nodes is one line."""
    found: dict[str, list[str]] = {}

    def add(report: NodeReport, problem: str) -> None:
        found.setdefault(problem, []).append(report.node)

    for report in reports:
        if report.shared:
            add(
                report,
                f"run_root: {report.shared}. run_root must be the same folder of a shared file system on every node: "
                "mount it there, or choose another run_root",
            )
        for package, wanted in driver.versions.items():
            have = report.versions.get(package, "not installed")
            if have != wanted:
                add(
                    report, f"{package} is {have} there, {wanted} on the driver: install the same version on every node"
                )
        if report.code != driver.code:
            add(
                report,
                f"the actors would run other code than the driver: {report.code_path} there is {report.code}, "
                f"{driver.code_path} is {driver.code}. Submit the folder of launch.py as the job's working directory, or "
                "the command `sightline`, and remove a PYTHONPATH that hides what is sent there",
            )
        for key, problem in _first_of_each_key(report.missing):
            add(report, f"{key}: {problem}. Put it where every node sees it under the same path")
    return [f"{_nodes(nodes)}: {problem}" for problem, nodes in found.items()]


def _first_of_each_key(missing: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (key, problems) with at most SHOWN_PATHS problems per key, and the rest as a count."""
    by_key: dict[str, list[str]] = {}
    for key, problem in missing:
        by_key.setdefault(key, []).append(problem)
    shown = []
    for key, problems in by_key.items():
        more = len(problems) - SHOWN_PATHS
        text = "; ".join(problems[:SHOWN_PATHS]) + (f"; and {more} more" if more > 0 else "")
        shown.append((key, text))
    return shown


def _amount(bundle: Bundle, kind: str) -> float:
    return bundle.cpus if kind == "CPU" else bundle.gpus


def _sizes(nodes: Sequence[Node]) -> str:
    return (
        ", ".join(f"{node.name} has {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes) or "there is no node"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _nodes(names: Sequence[str]) -> str:
    return f"node {names[0]}" if len(names) == 1 else f"{len(names)} nodes ({_listed(names)})"


# ---- what the run needs ----------------------------------------------------------------------------------------


def needed_paths(config: RunConfig) -> tuple[NeededPath, ...]:
    """Return the files and folders outside run_root that actors open: checkpoints, and a sample of the videos.

    Only those that the driver sees: a video that exists nowhere is skipped as a sample, and does not stop the run.
    """
    paths = [(key, path) for key, value in named_checkpoints(config) if (path := Path(value)).is_dir()]
    for split in ("train", "heldout"):
        file = getattr(config.data, split)
        if file and Path(file).is_file():
            paths.append((f"data.{split}", Path(file)))
            paths += [(f"data.{split}, a video", video) for video in sample_videos(config.data, Path(file))]
    return tuple(NeededPath(key, str(path.absolute()), stamp(str(path))) for key, path in paths)


def sample_videos(data: DataConfig, file: Path, count: int = SAMPLED_VIDEOS) -> list[Path]:
    """Return up to `count` different existing videos, from rows spread over the whole file."""
    tasks = sample_tasks(file, count, format=data.format, ignore_fields=data.ignore_fields)
    return list(dict.fromkeys(video for task in tasks if (video := Path(task.video)).is_file()))


def check_checkpoint_names(config: RunConfig, nodes: int) -> list[str]:
    """Return what is wrong with the names of checkpoints on a cluster.

    Actors run in other folders, so a path must be absolute. A hub id would be downloaded into one node's cache only.
    """
    problems = []
    for key, value in named_checkpoints(config):
        path = Path(value)
        if path.is_dir() and not path.is_absolute():
            problems.append(f"{key}={value} is relative, actors run in another folder: give {path.absolute()}")
        elif nodes > 1 and not path.is_dir() and is_hub_id(value):
            problems.append(
                f"{key}={value} is a hub id: it would be downloaded into the cache of the driver's node, where the other "
                f"{nodes - 1} do not see it. Download it into a folder on the shared file system and give that folder"
            )
    return problems


# ---- the thin shell around Ray -----------------------------------------------------------------------------------


def live_nodes() -> list[Node]:
    """Return the cluster's live nodes, sorted by address."""
    found = []
    for entry in ray.nodes():
        if not entry["Alive"]:
            continue
        resources = entry["Resources"]
        name = f"{entry['NodeManagerAddress']} ({entry['NodeManagerHostname']}, {entry['NodeID'][:6]})"
        found.append(Node(entry["NodeID"], name, resources.get("CPU", 0.0), resources.get("GPU", 0.0)))
    return sorted(found, key=lambda node: node.name)


def object_stores(group: PlacementGroup, bundles: Sequence[Bundle]) -> tuple[NodeStore, ...]:
    """Return the object stores of the nodes that a placed group lies on, with the actors there."""
    homes: dict[str, list[str]] = {}
    for index, node in placement_group_table(group)["bundles_to_node_id"].items():
        homes.setdefault(node, []).append(bundles[int(index)].name)
    return tuple(
        NodeStore(
            entry["NodeManagerAddress"],
            int(entry["Resources"].get("object_store_memory", 0)),
            tuple(actors),
            entry["NodeID"],
        )
        for entry in ray.nodes()
        if (actors := homes.get(entry["NodeID"]))
    )


def run_preflight(config: RunConfig, bundles: Sequence[Bundle]) -> None:
    """Raise PreflightError with every problem found. On a local Ray only resources are checked: no node is asked."""
    nodes = live_nodes()
    problems = check_resources(bundles, nodes)
    root = config.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    if config.cluster.existing:
        # Nodes that can hold no actor (a head without CPUs) need not see anything.
        hosts = [node for node in nodes if any(node.holds(bundle) for bundle in bundles)]
        problems += check_checkpoint_names(config, len(hosts))
        problems += ask_nodes(root, hosts, needed_paths(config), config.cluster.start_timeout_s)
    if problems:
        raise PreflightError(problems)


def ask_nodes(root: Path, nodes: Sequence[Node], needed: tuple[NeededPath, ...], timeout_s: float) -> list[str]:
    """Probe all nodes at the same time and return their problems."""
    nonce = secrets.token_hex(16)
    folder = root / f".preflight-{nonce[:8]}"
    try:
        folder.mkdir()
        (folder / DRIVER_FILE).write_text(nonce)
    except OSError as error:
        return [f"run_root={root} cannot be written by the driver: {error.strerror or error}"]
    try:
        request = ProbeRequest(str(folder), nonce, needed)
        reports, problems = _collect(nodes, request, timeout_s)
        problems += check_nodes(reports, NodeReport("driver", installed_versions(), *own_code()))
        for report in reports:
            if not report.shared and (wrong := await_content(folder / reply_file(report.node), nonce)):
                problems.append(
                    f"node {report.node}: what it writes into run_root={root} does not arrive here ({wrong}): run_root "
                    "must be the same folder of a shared file system on every node"
                )
        return problems
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _collect(nodes: Sequence[Node], request: ProbeRequest, timeout_s: float) -> tuple[list[NodeReport], list[str]]:
    remote: Any = ray.remote(probe)
    pending = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
        options = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        pending[options.remote(node.name, request)] = node
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
    reports, problems = [], []
    for reference in done:
        try:
            reports.append(ray.get(reference, timeout=timeout_s))
        except (ray.exceptions.RayError, ImportError) as error:
            problems.append(
                f"node {pending[reference].name}: the check could not run there ({_last_line(error)}): see Ray's logs on "
                "that node, and whether it has this project's packages installed"
            )
    for reference in late:
        ray.cancel(reference, force=True)
        problems.append(
            f"node {pending[reference].name}: no answer within {timeout_s:g} s (cluster.start_timeout_s): see `ray status` and "
            "Ray's logs on that node, remove it from the cluster, or raise the timeout"
        )
    return reports, problems


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
