"""A run whose processes are killed and stopped at random moments: is anything lost, done twice, or left behind?

    python -m benchmarks.chaos [--quick] [--kills N] [--seed S] [--inputs N] [--runs FOLDER] [--json PATH|-]
    python -m benchmarks.chaos --quickstart [--seed S]      # only a quickstart whose workers are killed by turns

Real runs (data, cold start, RL with evaluations, whole epochs) are hit one hit after the other: workers, scorers, learners and
drivers, killed, stopped for good, stopped for a while, or asked to stop. When a run has finished, its checkpoints, journal and
charts are compared with what it had to do, and another one begins. Then three hits on a deterministic run: its weights must be
the bits of an undisturbed one. Then runs on a cluster of several nodes, of which that of a worker and that of the learner are
taken away. At last, malformed inputs (`benchmarks.chaos.inputs`).

The result file is written after every hit: a call with the same --json goes on from what it has. Exit 1 says that something was
lost, done twice, hung, was left behind, or that an input ended unclearly.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.faults import KINDS, Fault, Hit, Hung, signature, strike
from benchmarks.chaos.inputs import try_inputs
from benchmarks.chaos.nodes import NODE_HITS, run_on_nodes
from benchmarks.chaos.quickstart import hit_quickstart
from benchmarks.chaos.subject import Subject
from benchmarks.environment import hardware, in_words, result_target, versions, write_result
from tests.support.killed_runs import DETERMINISTIC, exported

QUICK_INPUTS, INPUTS = 60, 500
DETERMINISTIC_HITS = ("worker", "driver", "learner")
APART = len(DETERMINISTIC_HITS) + len(NODE_HITS)
"""Hits that are not made at random."""
QUICK_KILLS, KILLS = len(KINDS) + APART, 100
RUNS_ON_NODES = 3
"""A run may end before the second hit."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Found:
    """What was seen so far.

    Attributes:
        hits: as `asdict` of Hit, in order.
        lost, duplicated, hung, unclear, leaked: what was, in words.
        bit_equal: of the deterministic run; None: not tried.
        on_nodes: whether the runs on several nodes have been.
    """

    seed: int
    hits: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    runs: int = 0
    bit_equal: bool | None = None
    on_nodes: bool = False
    inputs: int = 0
    inputs_clear: int = 0

    def row(self) -> dict[str, Any]:
        seconds = [hit["recovered_s"] for hit in self.hits if hit["recovered_s"] is not None]
        by_kind = Counter(hit["kind"] for hit in self.hits)
        return {
            "kills": len(self.hits),
            "by_kind": dict(sorted(by_kind.items())),
            "lost": len(self.lost),
            "duplicated": len(self.duplicated),
            "hung": len(self.hung),
            "recovered_s_p50": float(np.median(seconds)) if seconds else None,
            "recovered_s_max": max(seconds, default=None),
            "recovered_s_p50_by_kind": {
                kind: float(np.median([hit["recovered_s"] for hit in self.hits if hit["kind"] == kind]))
                for kind in by_kind
            },
            "resume_bit_equal": self.bit_equal,
            "bad_inputs_tried": self.inputs,
            "bad_inputs_clear": self.inputs_clear,
            "leaked_processes": len(self.leaked),
            "runs": self.runs,
            "state": asdict(self),
        }

    @property
    def good(self) -> bool:
        wrong = (self.lost, self.duplicated, self.hung, self.unclear, self.leaked)
        return not any(wrong) and self.bit_equal is not False and self.inputs == self.inputs_clear


class Chaos:
    """Hits runs under `folder` until there are `kills` hits; `found` has what was seen."""

    def __init__(self, folder: Path, kills: int, found: Found, save: Any) -> None:
        self.folder, self.kills, self.found, self._save = folder, kills, found, save
        self._chance = random.Random(f"{found.seed}/{len(found.hits)}")

    def random_runs(self) -> None:
        """Hit runs at random, each kind in its turn first."""
        while len(self.found.hits) < self.kills:
            subject = Subject(self.folder / f"run{self.found.runs}", f"seed={self.found.seed + self.found.runs}")
            self._through(subject, lambda: self._next_kind() if len(self.found.hits) < self.kills else None)

    def deterministic(self) -> None:
        """Hit a deterministic run, and compare it with one that was left alone."""
        alone = Subject(self.folder / "alone", *DETERMINISTIC)
        self._through(alone, lambda: None)
        left = list(DETERMINISTIC_HITS)
        hit = Subject(self.folder / "hit", *DETERMINISTIC)
        self._through(hit, lambda: left.pop(0) if left else None)
        if alone.ended and hit.ended and not self.found.hung:
            self.found.bit_equal = all(
                exported(alone.root, stage) == exported(hit.root, stage) for stage in ("sft", "rl")
            )
            say(
                f"deterministic weights, hit and left alone: {'the same bits' if self.found.bit_equal else 'DIFFERENT'}"
            )

    def nodes(self) -> None:
        """Take nodes away from runs on a cluster, until that was done in each way."""
        for run in range(RUNS_ON_NODES):
            missing = self._missing(NODE_HITS)
            if missing and not (self.found.hung or self.found.lost):
                with run_on_nodes(self.folder / f"nodes{run}") as (subject, faults):
                    self._through(subject, lambda left=missing: left.pop(0) if left else None, faults)
        self.found.lost += [f"no run lasted until a hit of the {kind}" for kind in self._missing(NODE_HITS)]
        self.found.on_nodes = True

    def _missing(self, kinds: Iterable[str]) -> list[str]:
        done = {hit["kind"] for hit in self.found.hits}
        return [kind for kind in kinds if kind not in done]

    def _next_kind(self) -> str:
        return self._chance.choice(self._missing(KINDS) or list(KINDS))

    def _through(self, subject: Subject, next_kind: Any, kinds: Mapping[str, Fault] = KINDS) -> None:
        """Drive one run to its end, hitting it with what `next_kind` returns until that is None."""
        kind = next_kind()
        try:
            while kind is not None and not subject.ended:
                hit = strike(subject, kind, self._chance, kinds)
                if hit is None:
                    break
                self._note(subject, hit)
                kind = next_kind()
            subject.look()
            status = subject.driver.wait()
        except Hung as error:
            self.found.hung.append(f"{subject.root.name}: {kind}: {error}; its log: {subject.driver.log}")
            say(self.found.hung[-1])
            subject.kill_all()
        else:
            self._judge(subject, status)
        self.found.runs += 1
        self._save()

    def _note(self, subject: Subject, hit: Hit) -> None:
        self.found.hits.append(asdict(hit))
        say(
            f"{len(self.found.hits)}: {subject.root.name} {hit.at}: {hit.kind}, recovered after {hit.recovered_s:.1f} s"
        )
        self._save()

    def _judge(self, subject: Subject, status: int) -> None:
        name, found = subject.root.name, self.found
        if status:
            found.lost.append(f"{name} ended with status {status}; its log: {subject.driver.log}")
        else:
            lost, twice = subject.audit()
            found.lost += [f"{name}: {what}" for what in lost]
            found.duplicated += [f"{name}: {what}" for what in twice]
        found.unclear += [f"{name}: {line}" for line in signature(subject.driver.output)]
        found.leaked += [f"{name}: process {pid}" for pid in subject.left_behind()]
        say(f"{name}: status {status}; lost {len(found.lost)}, twice {len(found.duplicated)}, left {len(found.leaked)}")


def _before(target: str, seed: int) -> Found:
    """Return what an earlier call with the same result file has seen, if its seed was this one."""
    if target in ("", "-") or not Path(target).is_file():
        return Found(seed)
    state = json.loads(Path(target).read_text()).get("state", {})
    return Found(**state) if state.get("seed") == seed else Found(seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_KILLS} hits, {QUICK_INPUTS} inputs")
    parser.add_argument(
        "--kills",
        type=int,
        help=f"default {KILLS}; {len(DETERMINISTIC_HITS)} are on a deterministic run, {len(NODE_HITS)} on a cluster's nodes",
    )
    parser.add_argument("--inputs", type=int, help=f"malformed inputs, default {INPUTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quickstart", action="store_true", help="only the quickstart, a worker killed every 20 s")
    parser.add_argument("--runs", type=Path, help="folder that the runs are left in (default: a temporary one)")
    parser.add_argument("--json", type=result_target, default="", help="a path, or - for standard output")
    given = parser.parse_args(arguments)
    kills = given.kills if given.kills is not None else (QUICK_KILLS if given.quick else KILLS)
    inputs = given.inputs if given.inputs is not None else (QUICK_INPUTS if given.quick else INPUTS)
    found = _before(given.json, given.seed)
    say(in_words())

    def save() -> None:
        if given.json not in ("", "-"):
            write_result(Path(given.json), found.row())

    with tempfile.TemporaryDirectory(prefix="chaos") as temporary:
        folder = given.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.quickstart:
            return hit_quickstart(folder / "quickstart", given.seed, say)
        chaos = Chaos(folder, kills - APART, found, save)
        chaos.random_runs()
        if found.bit_equal is None and kills >= APART:
            chaos.deterministic()
        if not found.on_nodes and kills >= APART:
            chaos.nodes()
        if not found.inputs:
            tried = try_inputs(inputs, given.seed, folder)
            found.inputs, found.inputs_clear = len(tried), sum(not unclear for unclear in tried)
            found.unclear += [unclear for unclear in tried if unclear]
        save()
    for what in (*found.lost, *found.duplicated, *found.hung, *found.leaked, *found.unclear):
        say(what)
    row = found.row()
    if given.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **row}))
    say(json.dumps({key: value for key, value in row.items() if key != "state"}))
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
