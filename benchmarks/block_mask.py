"""Time the block mask of packed rows: built from the log's intervals, beside torch's evaluation of every pair of tokens.

    python -m benchmarks.block_mask --json benchmarks/results/block_mask_cpu.json
    python -m benchmarks.block_mask --tokens 4096 --json -

Both run on the CPU and alternate within one run; figures are medians. `create_block_mask` runs eagerly, as torch ships it, on
the whole row. A row packs streams of 20 chunks of 192 video tokens end to end. A StreamWriter writes them under each policy;
those of `text_memory` have two lanes. Exit status 1: a mask differs from torch's in any block, or a mask of 32,768 tokens is
built less than 50 times as fast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.attention import CHUNKS, plain_layout, written
from benchmarks.environment import hardware, result_target, versions, write_result
from streams.memory import MemoryConfig
from streams.scoring.block_mask import BLOCK, BlockLists
from streams.scoring.mask import block_mask, mask_mod
from streams.scoring.packing import Rows, pack

TOKENS = (4096, 16384, 32768)
POLICIES = {
    "rcsm": MemoryConfig("rcsm", 8),
    "sink_window": MemoryConfig("sink_window", 8, text_window=12, sink_tokens=16, tail_tokens=64),
    "random": MemoryConfig("random", rate=0.1),
    "text_memory": MemoryConfig("text_memory"),
}
BAR, BAR_TOKENS = 50.0, 32768
"""The least speedup that passes, and the row length from which it is required."""
CHEAP = 5
"""Builds of ours for each of torch's: a single one is so short that one interruption would dominate it."""
BYTES_PER_PAIR = 12
"""Peak memory of the eager reference: the mask's 64-bit sum over blocks, and a few masks of one byte."""


def packed(tokens: int, policy: str) -> Rows:
    """Return one row of exactly `tokens` tokens: as many streams as fit, and padding."""
    layout = plain_layout()
    stream = written(layout, CHUNKS, "one", POLICIES[policy])
    if len(stream) > tokens:
        stream = written(layout, max(1, CHUNKS * tokens // len(stream) - 1), "one", POLICIES[policy])
    logs = [stream] * (tokens // len(stream))
    return pack(logs, [list(range(len(logs)))]).padded(BLOCK, at_least=tokens)


def eager(rows: Rows) -> BlockMask:
    length = rows.ids.shape[1]
    visible = mask_mod(rows.expiry[0].int(), rows.lane[0].int())
    return create_block_mask(visible, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)


def equal(found: BlockMask, wanted: BlockMask) -> bool:
    return all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in BlockLists.__annotations__)


def taken(call: Callable[[], BlockMask]) -> tuple[BlockMask, float]:
    """Return the result of `call`, and the milliseconds that it took."""
    began = time.perf_counter()
    mask = call()
    return mask, (time.perf_counter() - began) * 1e3


def measure_row(tokens: int, policy: str, repeats: int) -> dict[str, Any]:
    """Measure one length under one policy. Both ways alternate, after one warm-up that is not timed."""
    rows = packed(tokens, policy)
    length = rows.ids.shape[1]
    block_mask(rows.expiry, rows.lane)
    mine, theirs = [], []
    same = True
    for _ in range(repeats):
        for _ in range(CHEAP):
            found, took = taken(lambda: block_mask(rows.expiry, rows.lane))
            mine.append(took)
        wanted, took = taken(lambda: eager(rows))
        theirs.append(took)
        same = same and equal(found, wanted)
    blocks = (length // BLOCK) ** 2
    analytic_ms, eager_ms = statistics.median(mine), statistics.median(theirs)
    return {
        "tokens": length,
        "policy": policy,
        "analytic_ms": round(analytic_ms, 3),
        "eager_ms": round(eager_ms, 1),
        "speedup": round(eager_ms / analytic_ms, 1),
        "blocks": blocks,
        "full_blocks": int(found.full_kv_num_blocks.sum()),
        "partial_blocks": int(found.kv_num_blocks.sum()),
        "equal": same,
    }


def missed(row: dict[str, Any]) -> str | None:
    """Return why this row fails, or None."""
    if not row["equal"]:
        return f"{row['tokens']} tokens, {row['policy']}: the block mask differs from create_block_mask's"
    if row["tokens"] >= BAR_TOKENS and row["speedup"] < BAR:
        return f"{row['tokens']} tokens, {row['policy']}: {row['speedup']} times faster, less than {BAR:g}"
    return None


def available_bytes() -> int:
    """Return the memory in bytes that a process may still allocate, by Linux's own estimate."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.block_mask")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths of a row, multiples of 128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="anything that the reader must know, e.g. a shared machine")
    parser.add_argument("--json", type=result_target, default="-", help="file to write, - for the terminal")
    options = parser.parse_args(arguments)
    lengths = [int(n) for n in options.tokens.split(",")]
    if wrong := [n for n in lengths if n < 4 * BLOCK or n % BLOCK]:
        print(
            f"benchmarks.block_mask: --tokens {wrong[0]} is not a multiple of {BLOCK} from {4 * BLOCK} on",
            file=sys.stderr,
        )
        return 2
    if (needed := BYTES_PER_PAIR * max(lengths) ** 2) > available_bytes():
        print(
            f"benchmarks.block_mask: create_block_mask at {max(lengths)} tokens takes about {needed / 2**30:.0f} GiB, "
            f"{available_bytes() / 2**30:.0f} GiB are available: choose shorter --tokens",
            file=sys.stderr,
        )
        return 2
    rows = [measure_row(tokens, policy, options.repeats) for tokens in lengths for policy in POLICIES]
    failures = [text for row in rows if (text := missed(row))]
    measured = {"note": options.note, "threads": torch.get_num_threads(), "repeats": options.repeats, "rows": rows}
    measured["ok"] = not failures
    if options.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **measured}, indent=2))
    else:
        write_result(Path(options.json), measured)
    for line in failures:
        print(f"benchmarks.block_mask: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
