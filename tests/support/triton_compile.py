"""Compile our Triton kernels for an H100 with Triton's own assembler, which needs no GPU; prints a line per kernel.

python -m tests.support.triton_compile
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rollout.attention import triton_kernel
from streams.backbone.fused import kernels as fused_kernels

H100 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that a thread block may have there."""


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> int:
    """Return the bytes of shared memory that the kernel takes."""
    names, constants = kernel.arg_names, dict(constants)
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i64") for n in names}
    options = {"num_warps": constants.pop("num_warps")} if "num_warps" in constants else {}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    made = triton.compile(source, target=H100, options=options)
    assert made.asm["cubin"]
    return int(made.metadata.shared)


def fused(kind: str, hidden: int, heads: tuple[int, int, int]) -> dict[str, int]:
    """Return the bytes of shared memory that each fused kernel takes. heads: query heads, KV heads, head dimension."""
    wide = {"WIDE": triton.language.float32}
    found = {}
    # The last is the norm of the heads of Qwen3-VL, many rows to a program.
    for columns in (hidden, heads[2]):
        norm = fused_kernels.norm_sizes(columns) | wide | {"EPS": 1e-6}
        pointers = dict.fromkeys(("grad", "x", "weight", "out", "grad_x"), f"*{kind}") | {"grad_weight": "*fp32"}
        found[f"norm {columns}"] = compiled(fused_kernels._norm, pointers, norm)
        for trains in (True, False):
            own = norm | {"TRAINS": trains}
            found[f"norm {columns} backward {trains}"] = compiled(fused_kernels._norm_backward, pointers, own)
    pointers = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), f"*{kind}")
    for back in (False, True):
        rotation = fused_kernels.rotate_sizes(*heads) | wide | {"BACK": back}
        found[f"rotation {back}"] = compiled(fused_kernels._rotate, pointers, rotation)
    pointers = dict.fromkeys(("grad", "gate", "up", "out", "grad_gate", "grad_up"), f"*{kind}")
    gate = {"BLOCK": fused_kernels.GATE_VALUES} | wide
    found["gate"] = compiled(fused_kernels._gate, pointers, gate)
    found["gate backward"] = compiled(fused_kernels._gate_backward, pointers, gate)
    return found


if __name__ == "__main__":
    # Qwen2.5-VL-3B and Qwen3-VL-4B; 28 heads and 3584 of Qwen2.5-VL-7B, neither of which is a power of two.
    for kind, hidden, heads in (
        ("bf16", 2048, (16, 2, 128)),
        ("bf16", 2560, (32, 8, 128)),
        ("fp16", 3584, (28, 4, 128)),
        ("fp32", 2048, (16, 2, 128)),
    ):
        sizes = fused(kind, hidden, heads)
        assert max(sizes.values()) <= SHARED_MEMORY
        print("fused", kind, hidden, *sizes.values(), flush=True)
    for kind, dim in (
        ("bf16", 128),
        ("fp16", 64),
        ("bf16", 80),
        ("fp32", 128),
        ("fp32", 16),
        ("fp64", 16),
        ("fp64", 32),
    ):
        wide = "fp64" if kind == "fp64" else "fp32"
        factor = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16}.get(
            kind, triton.language.float64 if kind == "fp64" else triton.language.float32
        )
        sizes = triton_kernel.block_sizes(dim, {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[kind])
        inputs = dict.fromkeys(("q", "k", "v"), f"*{kind}") | dict.fromkeys(("table", "seats", "lengths"), "*i64")
        partial = {"sums": f"*{wide}", "logs": f"*{wide}"}
        own = {"SCALE": dim**-0.5, "GROUPS": 8, "BLOCK_GROUPS": 16, "FACTOR": factor}
        split = compiled(triton_kernel._split, inputs | partial, sizes | own)
        combine = compiled(triton_kernel._combine, partial | {"lengths": "*i64", "out": f"*{kind}"}, sizes)
        assert max(split, combine) <= SHARED_MEMORY
        print(kind, dim, split, combine, flush=True)
