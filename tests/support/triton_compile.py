"""Compile the decode kernels for an H100 with Triton's own assembler, which needs no GPU; prints a line per kernel.

python -m tests.support.triton_compile
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rollout.attention import triton_kernel

H100 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that a thread block may have there."""


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> int:
    """Return the bytes of shared memory that the kernel takes."""
    names = kernel.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i64") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    made = triton.compile(source, target=H100)
    assert made.asm["cubin"]
    return int(made.metadata.shared)


if __name__ == "__main__":
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
