"""`make quickstart` while a rollout worker is killed every EVERY_S: does it finish, and meet its bars?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.faults import POLL_S, signature
from benchmarks.quickstart import missed_bars
from tests.support.killed_runs import Driver, kill

EVERY_S = 20.0
LONGEST_S = 1800.0
WORKERS = 2


def hit_quickstart(root: Path, seed: int, say: Callable[[str], None]) -> int:
    """Run it, killing the workers by turns once they are there; returns 0 if it finished and misses no bar.

    Its wall time is reported without a bar: every kill costs a start.
    """
    driver = Driver(root, "experiment=quickstart", f"seed={seed}", "resume=never", settings=())
    began = time.monotonic()
    kills, next_at = 0, 0.0
    while driver.process.poll() is None and time.monotonic() - began < LONGEST_S:
        time.sleep(POLL_S)
        if not next_at and "actors ready" in driver.output:
            next_at = time.monotonic() + EVERY_S
        if next_at and time.monotonic() >= next_at:
            actor = f"rollout-{kills % WORKERS}"
            say(f"{time.monotonic() - began:.0f} s: killed {actor}, pid {kill(root, actor)}")
            kills, next_at = kills + 1, next_at + EVERY_S
    hung = driver.process.poll() is None
    if hung:
        driver.hang_up()
    status = driver.wait()
    say(driver.output)
    if hung or status:
        say(f"quickstart with {kills} kills: {f'not over after {LONGEST_S:g} s' if hung else f'status {status}'}")
        return 1
    summary = json.loads((root / "summary.json").read_text())
    missed = [*missed_bars(summary, timed=False), *signature(driver.output)]
    say(
        f"quickstart with {kills} kills, seed {seed}: {summary['wall_s']:.0f} s, reward {summary['heldout_reward_sft']:.3f} -> "
        f"{summary['heldout_reward_rl']:.3f}; bars missed: {'; '.join(missed) or 'none'}"
    )
    return int(bool(missed))
