"""Attention measured: the learner's on the log's block mask, and the engine's paged backends.

    python -m benchmarks.attention --device cpu --quick --json benchmarks/results/attention_cpu.json
    python -m benchmarks.attention --device cuda --json -

Learner: FlexAttention on the block mask of `rcsm` streams (20 chunks of 192 video tokens packed into a row, or one long
stream) against SDPA with the dense mask of the same predicate, and against the same kernel under a plain causal mask: how
many of the blocks that eviction saves became saved time. Forward and backward on CUDA, forward on CPU. Engine: FlashInfer
against the torch backend, one decode and one prefill step at the shape of a 3B model, and text layers with and without fused
kernels (CUDA only). Both sides of a ratio are measured in the same run, every row is written as soon as it is there, and exit
1 says that they computed different things.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import hardware, result_target, versions, write_result
from benchmarks.fused import fused_rows
from benchmarks.timing import WARM_UP, medians_ms
from rollout.attention import Attend, AttentionBackend, Segment, make_backend, with_decode
from rollout.engine.kv_pool import KVPool
from streams.backbone.attention import AttentionPlan
from streams.backbone.kernel_choice import Choice, choose_decode_attention
from streams.backbone.tiny import build_tokenizer
from streams.layout.layout import STREAMING_TOKENS, Layout, LayoutConfig
from streams.log.record import ChunkRecord, LogHeader, StreamLog
from streams.memory import MemoryConfig, knobs, make_policy
from streams.positions.mrope import QWEN2_5_VL_CONVENTION, PositionCursor
from streams.scoring.block_mask import BLOCK
from streams.scoring.compiled import compile_count
from streams.scoring.mask import DensePlan, FlexPlan, block_mask, dense_mask
from streams.scoring.packing import Rows, pack
from streams.writing.writer import StreamWriter, TurnInput

MEMORY = MemoryConfig("rcsm", 8)
GRID = (1, 12, 16)
CHUNKS = 20
TOKENS = (4096, 16384, 32768)
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far two kernels' results may be apart, relative, by dtype."""


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, head dimension."""

    query: int = 16
    kv: int = 2
    dim: int = 128


def written(layout: Layout, chunks: int, name: str, memory: MemoryConfig = MEMORY) -> StreamLog:
    """Return the log of a silent stream of `chunks` chunks, as the engine and the cold start write it."""
    header = LogHeader(
        stream_id=name,
        task_id=name,
        backbone="qwen2_5_vl",
        policy=memory.name,
        policy_knobs=knobs(memory),
        position_convention=QWEN2_5_VL_CONVENTION,
        banned=layout.banned,
        seed=0,
    )
    writer = StreamWriter(header, layout, make_policy(memory), PositionCursor(2.0, 1.0))
    for turn in range(chunks):
        writer.begin_turn(TurnInput(ChunkRecord(turn, "clip", (turn + 0.25, turn + 0.75), GRID, "clip")), 0)
        writer.extend_generated(layout.demonstration("nothing", None), 0, target=True)
    return writer.finish()


def plain_layout() -> Layout:
    """Return a layout for a tokenizer that needs no checkpoint."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(STREAMING_TOKENS))
    return Layout(tokenizer, LayoutConfig(system_prompt="Watch."), 640)


def stream_rows(tokens: int, kind: str) -> Rows:
    """Return one row of about `tokens` tokens. kind: `packed` streams of 20 chunks, or one `long` stream."""
    layout = plain_layout()
    one = written(layout, CHUNKS, "one")
    if kind == "packed":
        logs = [one] * max(1, round(tokens / len(one)))
    else:
        logs = [written(layout, round(tokens / len(one) * CHUNKS), "long")]
    return pack(logs, [list(range(len(logs)))]).padded(BLOCK, at_least=BLOCK)


def visited(expiry: torch.Tensor, lane: torch.Tensor) -> float:
    """Return the share of all blocks that a kernel on this mask must visit."""
    return 1.0 - float(block_mask(expiry, lane).sparsity()) / 100.0


def learner_row(tokens: int, kind: str, device: str, dtype: torch.dtype, heads: Heads, repeats: int) -> dict[str, Any]:
    """Measure one length and kind of stream; see the module docstring."""
    rows = stream_rows(tokens, kind).to(torch.device(device))
    length = rows.ids.shape[1]
    never = torch.full_like(rows.expiry, length)
    plans: dict[str, AttentionPlan] = {
        "flex": FlexPlan(block_mask(rows.expiry, rows.lane)),
        "flex_causal": FlexPlan(block_mask(never, rows.lane)),
        "sdpa": DensePlan(dense_mask(rows.expiry, rows.lane)),
    }
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, n, length, heads.dim), generator=generator, device=device, dtype=dtype)
        for n in (heads.query, heads.kv, heads.kv)
    )
    found: dict[str, Any] = {
        "tokens": length,
        "streams": kind,
        "blocks_visited": visited(rows.expiry, rows.lane),
        "blocks_visited_causal": visited(never, rows.lane),
    }
    with torch.no_grad():
        found |= medians_ms({"block_mask_ms": lambda: block_mask(rows.expiry, rows.lane)}, device, repeats)
        outs = {name: plan.attend(0, q, k, v, heads.dim**-0.5) for name, plan in plans.items()}
        found["max_difference"] = float((outs["flex"] - outs["sdpa"]).abs().max())
        found["relative_difference"] = relative([outs["flex"]], [outs["sdpa"]])
        calls = {
            f"{name}_forward_ms": lambda plan=plan: plan.attend(0, q, k, v, heads.dim**-0.5)
            for name, plan in plans.items()
        }
        found |= medians_ms(calls, device, repeats)
    found |= ratios(found, "forward")
    if device == "cuda":
        for tensor in (q, k, v):
            tensor.requires_grad_(True)
        kept = {name: plan.attend(0, q, k, v, heads.dim**-0.5) for name, plan in plans.items()}
        grad = torch.randn(kept["flex"].shape, generator=generator, device=device, dtype=dtype)
        grads = {n: torch.autograd.grad(kept[n], (q, k, v), grad, retain_graph=True) for n in ("flex", "sdpa")}
        found["backward_relative_difference"] = relative(grads["flex"], grads["sdpa"])
        calls = {
            f"{name}_backward_ms": lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
            for name, out in kept.items()
        }
        found |= medians_ms(calls, device, repeats)
        found |= ratios(found, "backward")
    return found


def relative(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest |got - wanted| / |wanted| of the pairs, in float32."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def disagreements(measured: dict[str, Any]) -> list[str]:
    """Return the rows whose kernels compute different things: their times mean nothing."""
    bar = AGREE[measured["dtype"]]
    wrong = []
    for row in [*measured["learner"], *measured.get("engine", []), *(measured.get("fused") or [])]:
        for name in ("relative_difference", "backward_relative_difference"):
            # Written so that NaN fails, too.
            if name in row and not row[name] <= bar:
                what = (
                    row["step"] if "step" in row else f"{row['tokens']} tokens, {row.get('streams', 'fused kernels')}"
                )
                wrong.append(f"{what}: {name} {row[name]:.1e} is above {bar:g}")
    return wrong


def ratios(found: dict[str, Any], which: str) -> dict[str, float]:
    """Return the speedup over SDPA, and which share of the blocks saved against a causal mask became saved time."""
    saved_blocks = 1 - found["blocks_visited"] / found["blocks_visited_causal"]
    saved_time = 1 - found[f"flex_{which}_ms"] / found[f"flex_causal_{which}_ms"]
    return {
        f"{which}_speedup_over_sdpa": found[f"sdpa_{which}_ms"] / found[f"flex_{which}_ms"],
        f"{which}_share_of_saved_blocks_that_is_saved_time": saved_time / saved_blocks,
    }


def paged_step(
    name: str,
    rows: int,
    streams: int,
    live: int,
    heads: Heads,
    repeats: int,
    device: str = "cuda",
    kernels: tuple[str, ...] = ("torch", "flashinfer"),
) -> dict[str, Any]:
    """Measure one forward of one layer: `streams` segments of `rows` tokens over `live` slots each, and its planning.

    One row each is a decode step over a table of slots. The torch kernel reads blocks, FlashInfer the same keys and values
    from pages in no order, and Triton, which only decodes, those of the last kernel.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    blocks = KVPool(streams * live, 1, heads.kv, heads.dim, dtype=dtype, device=device)
    blocks.kv.normal_(generator=torch.Generator(device).manual_seed(0))
    tables = {"torch": np.arange(streams * live).reshape(streams, live)}
    pools = {"torch": blocks}
    if "flashinfer" in kernels:
        pages = KVPool(streams * live, 1, heads.kv, heads.dim, dtype=dtype, device=device, paged=True)
        tables["flashinfer"] = np.random.default_rng(0).permutation(streams * live).reshape(streams, live)
        pages.kv[:, torch.from_numpy(tables["flashinfer"].ravel()).to(device)] = blocks.kv.permute(0, 3, 1, 2, 4)[
            :, :-1
        ]
        pools["flashinfer"] = pages
    groups = heads.query // heads.kv
    backends = {kernel: make_backend(kernel, pools[kernel], groups) for kernel in kernels}
    if rows == 1:
        last = kernels[-1]
        choice = choose_decode_attention("auto", device, last)
        decode, choice = with_decode(choice, Choice(last, ""), backends[last], pools[last], groups)
        if choice.name == "triton":
            backends["triton"], pools["triton"], tables["triton"] = decode, pools[last], tables[last]
    plans = {kernel: _plan(backend, tables[kernel], rows, device) for kernel, backend in backends.items()}
    q = torch.randn((heads.query, streams * rows, heads.dim), device=device, dtype=dtype)
    found: dict[str, Any] = {"step": name, "segments": streams, "rows": rows, "live": live}
    found |= medians_ms({f"{kernel}_plan_ms": plan for kernel, plan in plans.items()}, device, repeats)
    attends = {kernel: plan() for kernel, plan in plans.items()}
    outs = {kernel: attend(0, q, heads.dim**-0.5).float() for kernel, attend in attends.items()}
    calls = {f"{n}_layer_ms": lambda attend=attend: attend(0, q, heads.dim**-0.5) for n, attend in attends.items()}
    found |= medians_ms(calls, device, repeats)
    if "triton" in backends:
        found["triton_relative_difference"] = relative([outs["triton"]], [outs["torch"]])
    if "flashinfer" in kernels:
        found["mean_difference"] = float((outs["torch"] - outs["flashinfer"]).abs().mean())
        found["relative_difference"] = relative([outs["flashinfer"]], [outs["torch"]])
        found["layer_speedup"] = found["torch_layer_ms"] / found["flashinfer_layer_ms"]
    return found


def _plan(backend: AttentionBackend, table: np.ndarray, rows: int, device: str) -> Callable[[], Attend]:
    """Return what plans the forward: of a table of slots where each stream has one row, else of segments."""
    if rows > 1:
        segments = [Segment(i * rows, rows, slots) for i, slots in enumerate(table)]
        return lambda: backend.segments(segments)
    there, lanes = torch.from_numpy(table).to(device), torch.arange(len(table), device=device)
    lengths = torch.full((len(table),), table.shape[1], device=device)
    return lambda: backend.decode(there, lanes, lengths)


def measure(device: str, quick: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure everything and `save` what there is after every row. quick: fewer heads, two lengths, few repeats."""
    heads = Heads(2, 1, 128) if quick else Heads()
    repeats = 2 if quick else 10
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    measured: dict[str, Any] = {
        "complete": False,
        "memory": f"{MEMORY.name}, window {MEMORY.window}",
        "heads": vars(heads),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "statistic": f"median after {WARM_UP} calls",
        "learner": [],
        "fused": None,
    }

    def add(part: str, row: dict[str, Any]) -> None:
        measured[part] = [*(measured.get(part) or []), row]
        print(f"benchmarks.attention: {part}: {json.dumps(row)}", file=sys.stderr, flush=True)
        save(measured | {"compiles": compile_count()})

    if device == "cuda":
        # First: two rows, and they are the engine's.
        add("engine", paged_step("decode", 1, 64, 2048, Heads(), repeats))
        add("engine", paged_step("prefill", 206, 16, 2048, Heads(), repeats))
        for row in fused_rows(device, dtype, repeats):
            add("fused", row)
    for tokens in TOKENS[:2] if quick else TOKENS:
        for kind in ("packed", "long"):
            add("learner", learner_row(tokens, kind, device, dtype, heads, repeats))
    return measured | {"complete": True, "compiles": compile_count()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.attention")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer heads and lengths: minutes on a laptop")
    parser.add_argument("--note", default="", help="anything that the reader must know, e.g. a shared machine")
    parser.add_argument("--json", type=result_target, default="-", help="file to write, - for the terminal")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.attention: --device cuda, but this machine has no CUDA device", file=sys.stderr)
        return 2

    def save(found: dict[str, Any]) -> None:
        if options.json != "-":
            write_result(Path(options.json), {"note": options.note, **found})

    measured = {"note": options.note, **measure(options.device, options.quick, save)}
    if options.json == "-":
        print(json.dumps({"hardware": hardware(), "versions": versions(), **measured}, indent=2))
    else:
        write_result(Path(options.json), measured)
    wrong = disagreements(measured)
    for line in wrong:
        print(f"benchmarks.attention: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
