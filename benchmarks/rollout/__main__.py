"""The rollout engine beside the published approach and beside no engine at all, in one run on the same clips and weights.

    python -m benchmarks.rollout [--quick] [--device cpu|cuda] [--preset tiny|small|qwen2.5-vl-3b] [--json PATH|-]

Baselines: benchmarks/baselines/copy_evict.py and rebuild.py, whose heads say what they do. Everything takes turns; figures are
medians, ratios are how many times as long a stream takes in the baseline. On a CPU once with one thread and once with two: the
ratios at the top of the result are those of one thread, both are under "threads". Null: not measured on this device, or not
yet: the file is written after every part. Exit 1: greedy tokens of engine and baselines differ in float32 (in bfloat16
near-ties fall either way; how many tokens are equal is reported).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import hardware, in_words, result_target, versions, write_result
from benchmarks.rollout import compare, floors
from benchmarks.rollout.host import draw_us, growth, host
from benchmarks.rollout.lengths import mixed_lengths
from benchmarks.rollout.presets import PRESETS, Preset, World, make_world
from benchmarks.rollout.runs import EngineRun, run_engine

Row = dict[str, Any]
FROM_THREADS = (
    *("ratio_vs_copy_evict", "ratio_vs_copy_evict_shared_vision", "ratio_vs_rebuild", "ratio_vs_copy_evict_one_group"),
    *("copy_evict_host_share", "vision_encodes_per_chunk", "kv_bytes_copied_per_turn", "live_kv_bytes"),
)
"""Figures at the top of the result that are those of the first number of threads."""
MEASURED = (
    *FROM_THREADS,
    *("host_us_per_token", "host_us_per_token_256", "host_us_per_token_before", "draw_us_per_token"),
    *("late_over_early_p50", "decode_over_floor", "decode_tokens_per_s_b1", "turn_p99_ms_b1"),
)
HOST_PRESET = "tiny"
"""The host's time per token does not depend on the model: its answers are ready-made."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure_threads(world: World, threads: int | None, rounds: int, baseline_prompts: int, *, first: bool) -> Row:
    """Everything that runs the model, with so many threads; None: the device has its own."""
    if threads is not None:
        torch.set_num_threads(threads)
    timed = compare.side_by_side(world, rounds, baseline_prompts, one_step=first)
    run: EngineRun = timed.last["engine"]
    say(f"{threads or 'no'} threads: {timed.ratio('copy_evict', 'engine'):.2f} times copy_evict")
    prefill = compare.prefill_tokens(run)
    baselines = ("copy_evict", "copy_evict_shared_vision")
    rebuilt = compare.rebuild_seconds(world, timed)
    video = run.chunks_encoded * int(np.prod(world.preset.grid))
    forwarded = sum(len(log) for log in run.logs)
    peak = floors.peak_flops(world.backbone.device, world.backbone.dtype)
    floor = floors.floor_ratio(world, prefill, world.preset.prompts)
    row: Row = {
        "ratio_vs_copy_evict": timed.ratio("copy_evict", "engine"),
        "ratio_vs_copy_evict_shared_vision": timed.ratio("copy_evict_shared_vision", "engine"),
        "ratio_vs_rebuild": rebuilt / timed.per_stream("engine"),
        "ratio_vs_copy_evict_one_group": timed.ratio("copy_evict", "engine_one_group"),
        "ratio_vs_copy_evict_one_group_shared_vision": timed.ratio("copy_evict_shared_vision", "engine_one_group"),
        "cpu_time_ratios": {
            f"{name} / {engine}": timed.ratio(name, engine, cpu=True)
            for name in baselines
            for engine in ("engine", "engine_one_group")
        },
        "seconds_per_stream": {name: timed.per_stream(name) for name in timed.wall},
        "streams_per_s": 1 / timed.per_stream("engine"),
        "rounds": {name: [round(s, 4) for s in seconds] for name, seconds in timed.wall.items()},
        "causes": compare.causes(world, timed),
        "turns": compare.turn_times(run),
        "copy_evict_host_share": _host_share(timed),
        "vision_encodes_per_chunk": run.chunks_encoded / (world.chunks * world.preset.prompts),
        "kv_bytes_copied_per_turn": None if run.kv_copied is None else run.kv_copied / world.chunks,
        "live_kv_bytes": compare.live_kv_bytes(run, world),
        "tower_over_prefill": floor["tower_seconds_per_chunk"] / floor["prefill_seconds_per_chunk"],
        "linear_floor": floor,
        "peak_gemm_gflops": peak / 1e9,
        "share_of_peak": _shares(world, timed, forwarded, run.sampled, video, peak),
    }
    return row


def _host_share(timed: compare.Timed) -> float | None:
    shares = [made.host_share for made in timed.last["copy_evict"]]
    return None if None in shares else float(np.median(shares))


def _shares(world: World, timed: compare.Timed, forwarded: int, sampled: int, video: int, peak: float) -> Row:
    """FLOP/s of linear layers over the peak, of both sides."""
    engine = floors.linear_flops(world, forwarded, sampled, video) / world.preset.streams
    theirs = timed.last["copy_evict"]
    rows = world.preset.group
    encoded = sum(made.chunks_encoded for made in theirs) * int(np.prod(world.preset.grid))
    flops = floors.linear_flops(
        world, sum(made.forwarded for made in theirs), sum(made.sampled for made in theirs), encoded
    )
    return {
        "engine": engine / timed.per_stream("engine") / peak,
        "copy_evict": flops / (len(theirs) * rows) / timed.per_stream("copy_evict") / peak,
    }


def measure_host(device: str, vocabulary: World, quick: bool) -> Row:
    """The host's time per token, the draw and the growth with turns; one thread."""
    with tempfile.TemporaryDirectory() as folder:
        # The budgets of a published turn: 22 generated tokens, 20 of them sampled.
        preset = replace(PRESETS[HOST_PRESET], think_budget=20, max_new_tokens=22)
        world = make_world(preset, Path(folder), device, 1)
        found = host(world, turns=12 if quick else 24, rounds=3 if quick else 5)
        say(f"host: {found['now']:.1f} us a token ({found['now_cpu']:.1f} of CPU time)")
        say(f"before: {found['before']:.1f} ({found['before_cpu']:.1f})")
        grown = growth(world)
        say(f"growth: {grown['ratio']:.3f}")
    draws = draw_us(vocabulary)
    return {"host": found, "draw_us": draws, "growth": grown}


def measure_alone(world: World) -> Row:
    """One live stream by itself: decode tokens a second and the slowest turns."""
    alone = replace(world, preset=replace(world.preset, prompts=1, group=1))
    run_engine(alone, [0], chunks=2)
    run = run_engine(alone, [0])
    return {
        "decode_tokens_per_s_b1": compare.throughput(alone, min(3, world.chunks))["decode_tokens_per_s"],
        "turn_p99_ms_b1": float(np.percentile(run.turn_ms(slice(1, None)), 99)),
    }


def decode_over_floor(world: World, throughput: Row) -> float | None:
    """A decode step over the time that its weights and live keys and values take to be read; on CUDA only."""
    device = world.backbone.device
    if device.type != "cuda":
        return None
    text = world.backbone.model.model.language_model
    weights = sum(p.numel() * p.element_size() for p in text.parameters()) + world.backbone.model.lm_head.weight.nbytes
    # Both are read once; the bandwidth of a copy counts what it reads and what it writes.
    return (
        throughput["decode_step_ms"] / 1e3 / ((weights + throughput["live_kv_bytes"]) / floors.copy_bandwidth(device))
    )


def measure(
    preset: Preset,
    device: str,
    quick: bool,
    threads: tuple[int, ...] = (1, 2),
    save: Callable[[Row], None] = lambda found: None,
) -> Row:
    """All of it, as the result file has it but for hardware and versions. threads: on a CPU. save: called after every part."""
    chunks = preset.quick_chunks if quick else preset.chunks
    rounds, baseline_prompts = (1, 1) if quick else (3, 2)
    if preset.name == "tiny":
        rounds, baseline_prompts = 3, preset.prompts
    found: Row = {"device": device, "preset": preset.name, **dict.fromkeys(MEASURED), "complete": False}
    found |= {"quick": quick, "chunks": chunks, "threads": {}, "fused_kernels": None}

    def add(part: Row) -> None:
        found.update(part)
        save(found)

    with tempfile.TemporaryDirectory() as folder:
        world = make_world(preset, Path(folder), device, chunks)
        found["fused_kernels"] = world.backbone.fused_kernels
        say(f"{preset.name} on {device}: {preset.streams} streams of {chunks} turns; greedy agreement first")
        add({"agreement": compare.agreement(world, 1 if quick else 2, min(chunks, preset.window + 2))})
        say(f"agreement: {found['agreement']}")
        add(measure_alone(world))
        for i, count in enumerate(threads if device == "cpu" else (None,)):
            row = measure_threads(world, count, rounds, baseline_prompts, first=not i)
            found["threads"][str(count or "device")] = row
            add({} if i else {name: row[name] for name in FROM_THREADS})
        if device == "cpu":
            torch.set_num_threads(1)
        if device == "cpu":
            add({"throughput": compare.throughput(world, 2 if quick else min(3, chunks))})
        else:
            # Where the floor is told, memory is full.
            turns = min(chunks, preset.window + 2)
            add({"throughput": compare.throughput(world, turns, first=turns - 2)})
        add({"decode_over_floor": decode_over_floor(world, found["throughput"])})
        add({"mixed_lengths": mixed_lengths(world, 1 if quick else 3)})
        say(
            f"one long stream beside short ones: {found['mixed_lengths']['ratio']:.3f} of a step with as many keys, all alike"
        )
        beside = measure_host(device, world, quick)
    add(
        {
            "host_us_per_token": beside["host"]["now"],
            "host_us_per_token_256": beside["host"]["now_256"],
            "host_us_per_token_before": beside["host"]["before"],
            "draw_us_per_token": beside["draw_us"]["now"],
            "late_over_early_p50": beside["growth"]["ratio"],
            "peak_memory_bytes": compare.peak_memory(),
            **beside,
            "complete": True,
        }
    )
    return found


def agreed(found: Row, preset: Preset) -> bool:
    """Whether greedy tokens are what they must be; in half precision there is nothing that they must be."""
    if preset.dtype != torch.float32:
        return True
    return bool(found["agreement"]["copy_evict"] and found["agreement"]["rebuild"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, one round: under ten minutes on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: small, on CUDA qwen2.5-vl-3b")
    parser.add_argument("--json", type=result_target, default="", help="a path, or - for standard output")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    say(in_words())
    preset = PRESETS[given.preset or ("small" if given.device == "cpu" else "qwen2.5-vl-3b")]

    def save(found: Row) -> None:
        if given.json not in ("", "-"):
            write_result(Path(given.json), found)

    measured = measure(preset, given.device, given.quick, save=save)
    if given.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **measured}))
    summary = {key: value for key, value in measured.items() if not isinstance(value, dict)}
    say(json.dumps(summary))
    return 0 if agreed(measured, preset) else 1


if __name__ == "__main__":
    sys.exit(main())
