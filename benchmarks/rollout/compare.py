"""Engine and baselines in turns: seconds per stream, what each cause of the difference is worth, and whether tokens agree.

Invariants:
* what is compared ran in one process, on the same clips and weights, one after the other, round by round; every figure is the
  median of the rounds;
* on a CPU the baselines, too, run on weights as an engine lays them out: a ratio does not measure that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.rebuild import Rebuild
from benchmarks.rollout.presets import World
from benchmarks.rollout.runs import EngineRun, run_copy_evict, run_engine, written
from streams.log.record import Kind

Row = dict[str, Any]


def agreement(world: World, prompts: int, chunks: int) -> Row:
    """Greedy tokens of engine, `copy_evict` and, until something is evicted, `rebuild`; one stream of each prompt."""
    run = run_engine(world, range(prompts), temperature=0.0, group=1, chunks=chunks)
    made, _ = run_copy_evict(world, range(prompts), temperature=0.0, chunks=chunks)
    equal = tokens = 0
    for log, group in zip(run.logs, made, strict=True):
        ours = list(chain(*written(log)))
        for theirs in (list(chain(*row)) for row in group.ids):
            tokens += len(ours)
            equal += sum(a == b for a, b in zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else 0
    rebuild = Rebuild(world.backbone, world.folder / "export")
    # Two turns tell: the first, and the last before anything leaves.
    checked = {0, min(chunks, world.preset.window) - 1}
    again = all(
        rebuild.turn([log], turn, world.clips[prompt])[0] == [written(log)[turn]]
        for prompt, log in enumerate(run.logs[:1])
        for turn in checked
    )
    return {
        "tokens": tokens,
        "equal": equal,
        "copy_evict": equal == tokens,
        "rebuild": again,
        "rebuild_turns": sorted(checked),
    }


class Timed:
    """Seconds of cases by name, round by round; the last result of each is kept."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.last: dict[str, Any] = {}

    def run(self, cases: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> None:
        """cases: by name, what is run and how many streams that is."""
        for _ in range(rounds):
            for name, (case, streams) in cases.items():
                wall, cpu = time.perf_counter(), time.process_time()
                made = case()
                # An engine's run says what it took without making its buffers.
                seconds = made.seconds if isinstance(made, EngineRun) else time.perf_counter() - wall
                self.wall.setdefault(name, []).append(seconds / streams)
                self.cpu.setdefault(name, []).append((time.process_time() - cpu) / streams)
                self.last[name] = made

    def per_stream(self, name: str, *, cpu: bool = False) -> float:
        """Median seconds of a stream, of wall or CPU time."""
        return float(np.median((self.cpu if cpu else self.wall)[name]))

    def ratio(self, slow: str, fast: str, *, cpu: bool = False) -> float:
        """How many times as long a stream takes in `slow`: the median over rounds."""
        times = self.cpu if cpu else self.wall
        return float(np.median(np.array(times[slow]) / np.array(times[fast])))


def side_by_side(world: World, rounds: int, baseline_prompts: int, *, one_step: bool) -> Timed:
    """Time all cases.

    baseline_prompts: prompts that `copy_evict` is timed on. It runs them one by one: their number changes no stream's time.
    one_step: also the engine with one decode step a visit.
    """
    preset = world.preset
    everyone, some = range(preset.prompts), range(baseline_prompts)
    streams, group = preset.streams, preset.group
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "engine": (lambda: run_engine(world, everyone), streams),
        "copy_evict": (lambda: run_copy_evict(world, some)[0], baseline_prompts * group),
        "copy_evict_shared_vision": (
            lambda: run_copy_evict(world, some, share_vision=True)[0],
            baseline_prompts * group,
        ),
        "engine_one_group": (lambda: run_engine(world, [0]), group),
    }
    if one_step:
        cases["engine_one_decode_step"] = (lambda: run_engine(world, everyone, settings={"decode_steps": 1}), streams)
    if world.backbone.device.type == "cuda":
        cases["engine_no_graphs"] = (lambda: run_engine(world, everyone, settings={"cuda_graphs": "off"}), streams)
    warm = min(2, world.chunks)
    run_engine(world, [0], chunks=warm)
    run_copy_evict(world, [0], chunks=warm)
    timed = Timed()
    timed.run(cases, rounds)
    return timed


def rebuild_seconds(world: World, timed: Timed) -> float:
    """Seconds of a stream of one prompt's group that is rebuilt every turn."""
    run: EngineRun = timed.last["engine"]
    logs = run.logs[: world.preset.group]
    rebuild = Rebuild(world.backbone, world.folder / "export")
    # Every turn: the first ones, before the window of video is full, have less to prefill.
    return sum(rebuild.turn(logs, turn, world.clips[0])[1] for turn in range(world.chunks)) / len(logs)


def causes(world: World, timed: Timed) -> Row:
    """What each cause alone is worth, as a ratio of times; None where it cannot be told here."""
    group = world.preset.group
    run: EngineRun = timed.last["engine"]
    parts = timed.last["copy_evict"][0].seconds
    engine = timed.per_stream("engine")
    # What encoding once per stream would add: the measured time of encoding, for each other stream of the group.
    vision = run.vision_seconds / world.preset.streams
    evicted = parts["cache copies"] / parts["all"] if parts else None
    return {
        "batch_over_prompts": timed.ratio("engine_one_group", "engine"),
        "shared_vision": (engine + vision * (group - 1)) / engine,
        "no_copies": None if evicted is None else 1 / (1 - evicted),
        "decode_steps": timed.ratio("engine_one_decode_step", "engine")
        if "engine_one_decode_step" in timed.wall
        else None,
        "cuda_graphs": timed.ratio("engine_no_graphs", "engine") if "engine_no_graphs" in timed.wall else None,
    }


def throughput(world: World, chunks: int, first: int = 0) -> Row:
    """Prefill and decode tokens a second: from what some more generated tokens a turn add to the time of a few turns.

    first: turn from which decode steps are timed. live_kv_bytes: what a decode step of the last turns reads.
    """
    short, more = world.preset.max_new_tokens, world.preset.max_new_tokens
    runs = [
        run_engine(world, range(world.preset.prompts), chunks=chunks, max_new_tokens=tokens)
        for tokens in (short, short + more)
    ]
    run = runs[0]
    took = [float(np.median([sum(seconds[first:]) for seconds in one.turn_seconds])) for one in runs]
    per_step = max(took[1] - took[0], 1e-9) / ((chunks - first) * more)
    live = [live_kv_bytes(one, world) for one in runs]
    # A turn's first token comes from the prefill, and two of the last go together.
    decode = per_step * chunks * (short - 3)
    prefill = max(run.seconds - run.vision_seconds - decode, 1e-9)
    return {
        "decode_step_ms": 1e3 * per_step,
        "decode_tokens_per_s": world.preset.streams / per_step,
        "prefill_tokens_per_s": run.prefilled / prefill,
        # The longer run has twice the steps over more text: the difference of both costs as steps over twice that more.
        "live_kv_bytes": 2 * live[1] - live[0],
    }


def live_kv_bytes(run: EngineRun, world: World) -> int:
    """Bytes of keys and values that are live in the last turn of all streams, at its end."""
    layers, (heads, width) = world.backbone.num_layers, world.backbone.kv_shape
    live = sum(int((log.expiry >= len(log)).sum()) for log in run.logs)
    return live * layers * heads * width * 2 * world.backbone.dtype.itemsize


def turn_times(run: EngineRun) -> Row:
    """Milliseconds of a turn, p50 and p99 over streams: of the first quarter of the turns (but for the first), of the last."""
    turns = len(run.turn_seconds[0])
    quarter = max(1, turns // 4)
    parts = {"early": slice(1, 1 + quarter), "late": slice(turns - quarter, turns)}
    return {
        f"{name}_p{p}_ms": float(np.percentile(run.turn_ms(part), p)) for name, part in parts.items() for p in (50, 99)
    }


def prefill_tokens(run: EngineRun) -> int:
    """Tokens of a turn's prefill, END and the token before it included."""
    log = run.logs[0]
    counted = (log.turn == 1) & np.isin(log.kind, (Kind.SCAFFOLD, Kind.VIDEO, Kind.QUERY))
    return int(counted.sum()) + 2


def peak_memory() -> dict[str, int]:
    """Bytes: of the process, and of the device if there is one."""
    import resource

    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found
